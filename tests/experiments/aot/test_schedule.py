"""The reader of a TPU's schedule, on lines as libtpu writes them."""

import pytest

from experiments.aot.schedule import read_schedule

# Two bundles before a loop of 128 trips, whose body of four calls a fusion; the way back takes a bundle outside.
PROGRAM = """\
LB: loop body

     0   :  { %1 = vsyncpa [#allocation1], 0 } /* Start region 3 */
   0x1   :  { %2 = vsyncpa [#allocation1], 0 }
   0x2 LB: > { %s1_s1 = sld [smem:[#allocation41_spill]] /* phi copy */ } /* Start region 744 :: Start region 2343 */
   0x3   : > { %238 = inlined_call %s1_s0, %s1_s1 /* %fusion.9 = fusion(%get-tuple-element.246, %copy.32) */ }
   0x4   : > { %p343_p2 = scmp.lt.s32.totalorder %s465_s1, 128  ;;  %466 = compiler-scheduling-barrier }
   0x5   : > { %s344_s9 = scalar_select /*predicate=*/%p343_p2, /*on_true=*/1, /*on_false=*/0 } /* End region 95 */
   0x6   : > { %p346_p3 = scmp.eq.s32.totalorder %s344_s9, 0 } /* End region 87 */
   0x7   :  { %348 = sbr.rel (!%p346_p3) target = $region744 }
"""
# A pipeline of six trips with a loop of 32 inside, and one whose end is not a number.
FUSION = """\
     0   :  { %2 = vsyncpa [#allocation1], 0 }
   0x1 LB: > { %s7_s7 = sadd.s32 4294967295, %s6_s6 } /* Start region 54 */
   0x2 LB: >> { %v1_v1 = vld [vmem:[#allocation31_spill] sm:$0xff] } /* Start region 366 */
   0x3   : >> { %p547_p0 = scmp.ge.s32.totalorder %s12_s15, 32 /* loop exit test */ }
   0x4   : > { %549 = sbr.rel (!%p547_p0) target = $region366 }
   0x5 LB: >> { %v1_v1 = vld [vmem:[#allocation31_spill] sm:$0xff] } /* Start region 9 */
   0x6   : > { %p9_p9 = scmp.ge.s32.totalorder %s13_s6, %s14_s1 /* loop exit test */ }
   0x7   : > { %9 = sbr.rel (!%p9_p9) target = $region9 }
   0x8   : > { %p10_p1 = scmp.ge.s32.totalorder %s13_s6, 6 /* loop exit test */ } /* End region 3 */
   0x9   :  { %12 = sbr.rel (!%p10_p1) target = $region54 }
"""


def test_bundles_are_counted_as_often_as_the_loops_around_them_run(tmp_path):
    (tmp_path / "1796005280452744643-TLP-73-final_bundles.txt").write_text(PROGRAM)
    (tmp_path / "1796005280452744644-fusion.9-66-final_bundles.txt").write_text(FUSION)
    (tmp_path / "1796005280452744644-fusion.9-65-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    schedule = read_schedule(tmp_path)
    program, fusion = 3 + 128 * 5, 2 + 6 * (5 + 32 * 2) + 6
    assert schedule.parts == {"fusion.9": 128 * fusion, "(program)": program}
    assert schedule.bundles == program + 128 * fusion
    assert schedule.unknown == ("fusion.9",)
    assert schedule.milliseconds("v5e") == pytest.approx(schedule.bundles / 1.5e6)


def test_a_loop_that_ends_on_a_bit_and_a_kernel_that_is_called_are_counted(tmp_path):
    bit = "%s345_s9 = sand.u32 1, %s344_s9 }\n   0x6   : > { %p346_p3 = scmp.eq.s32.totalorder %s345_s9, 0 }"
    program = PROGRAM.replace("%p346_p3 = scmp.eq.s32.totalorder %s344_s9, 0 }", bit).replace("inlined_call", "call")
    assert program.count("sand") == program.count(" call ") == 1
    (tmp_path / "1796005280452744643-TLP-73-final_bundles.txt").write_text(program)
    (tmp_path / "1796005280452744644-fusion.9-66-final_bundles.txt").write_text("     0   :  { %2 = vsyncpa 0 }\n")
    schedule = read_schedule(tmp_path)
    assert schedule.parts == {"(program)": 3 + 128 * 6, "fusion.9": 128}
    assert not schedule.unknown


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="start_dump"):
        read_schedule(tmp_path)
