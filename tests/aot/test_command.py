"""`python -m experiments.aot` on a small shape."""

import dataclasses
import sys

import jax
import pytest

from experiments.aot import command, report
from experiments.aot.targets import Target, missing
from tests.aot.conftest import found

SMALL = ["--model.n-layers", "2", "--model.d-model", "64", "--model.vocab-size", "128", "--seq-len", "64"]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    status = command.main()
    return status, capsys.readouterr().out


@pytest.mark.aot
def test_says_what_a_step_takes_and_whether_it_fits(h100, monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "mamba2-130m", "--device", "h100", "--batch-size", "4", *SMALL)
    assert status == 0
    assert "mamba2-130m train, 4 rows x 64 tokens: 1 x NVIDIA H100 80GB HBM3 (h100)" in said
    for words in ("arguments", "temporaries", "of 81,008: fits", "TFLOP/s", "s of CPU time"):
        assert words in said
    _, decoded = run(monkeypatch, capsys, "mamba2-130m", "--device", "h100", "--what", "decode", *SMALL)
    assert "mamba2-130m decode" in decoded


@pytest.mark.aot
def test_says_that_it_does_not_fit(h100, monkeypatch, capsys):
    arguments = ["mamba2-130m", "--device", "h100", "--what", "decode", "--batch-size", "2000000", *SMALL]
    status, said = run(monkeypatch, capsys, *arguments)
    assert status == 1
    assert "does not fit" in said


@pytest.mark.aot
def test_a_report_writes_its_rows(h100, monkeypatch, capsys, tmp_path):
    document = tmp_path / "RESULTS.md"
    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    item = report.Item("mamba2-130m", "decode", 2, 64, (("pattern", "mamba2"),))
    monkeypatch.setattr(report, "ITEMS", (item,))
    run(monkeypatch, capsys, "--report", str(document), "--device", "h100")
    assert "| mamba2-130m `mamba2` | decode | 2 x 64 | h100 |" in document.read_text()


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"h100: jax-cuda12-plugin is not installed here"):
        run(monkeypatch, capsys, "mamba2-130m", "--device", "h100")
    with pytest.raises(ValueError, match="unknown preset 'mamba2-130', did you mean 'mamba2-130m'"):
        run(monkeypatch, capsys, "mamba2-130")


def test_a_tpu_is_compiled_for_at_the_faster_level_unless_something_else_is_said():
    tpu, gpu = (Target("", platform, (), 0, 1.0, {}) for platform in ("tpu", "cuda"))
    config = command.preset("m2-bert-80m")
    assert command.level_of(config, tpu) == "O1"
    assert command.level_of(config, gpu) is None
    assert command.level_of(dataclasses.replace(config, schedule=True), tpu) is None
    assert command.level_of(dataclasses.replace(config, optimization_level="O2"), tpu) == "O2"
    before = jax.config.values["jax_optimization_level"]
    try:
        jax.config.update("jax_optimization_level", "O3")
        assert command.level_of(config, tpu) is None
    finally:
        jax.config.update("jax_optimization_level", before)


def test_every_model_of_the_report_has_a_preset():
    for item in report.ITEMS:
        assert command.preset(item.preset).model.dtype == "bfloat16"
    assert missing("v5e:2x2") or found("v5e:2x2").memory > 15e9
