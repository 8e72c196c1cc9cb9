"""How long a TPU's program is: the instructions that its compiler has scheduled, times how often each is issued.

A TPU issues one bundle of instructions a cycle, in the order that the compiler wrote down, so that bundles times trips
of the loops around them, over the clock, are a time: without waits for memory, and with both sides of every branch. It
compares two forms of one operation; it does not say how fast a program runs.

    start_dump(folder)                     # before libtpu is loaded, that is before the first program is compiled
    compile_for(target, function, *args)
    read_schedule(folder).milliseconds("v5e")

What libtpu writes (0.0.41, 0.0.52): a file of final bundles for each fusion and kernel, and one for the program that
calls them (`inlined_call`, and `call` of a kernel), a line a bundle, `>` marking how many loops are around it. A loop
starts at "LB:" and ends at a branch back to its region, on a predicate that compares its counter with the number of
trips, by itself or as the lowest bit of a scalar.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# Clock of a TensorCore in GHz: peak bf16 FLOP/s over 2 x the multipliers of its matrix units (4 of 128 x 128, or of
# 256 x 256 in a v6e, which has 2 of them).
CLOCKS = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75}

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
_STARTED = re.compile(r"Start region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(!(%\w+)\) target = \$region(\d+)")
_COMPARED = re.compile(r"(%p\w+) = scmp\.(?:ge|lt)\.s32\.totalorder (%\w+), (\d+)")
_SELECTED = re.compile(r"(%s\w+) = scalar_select /\*predicate=\*/(%p\w+),")
_TESTED = re.compile(r"(%p\w+) = scmp\.eq\.s32\.totalorder (%s\w+), 0")
_MASKED = re.compile(r"(%s\w+) = sand\.u32 1, (%s\w+)")
_CALL = re.compile(r"= (?:inlined_)?call .*?/\* %?([^\s=*]+)")


class Schedule(NamedTuple):
    """Bundles that a program issues."""

    bundles: int
    """Of the whole program, each as often as it is issued."""
    parts: dict[str, int]
    """Likewise of each fusion and kernel, by its name in the compiled program's text, largest first."""
    unknown: tuple[str, ...]
    """Parts with a loop whose trips could not be read: it is counted once."""

    def milliseconds(self, kind: str) -> float:
        """The time that issuing them takes on a TPU of a kind, "v5e": a lower bound, without waits for memory."""
        return self.bundles / CLOCKS[kind] / 1e6


def start_dump(folder: str | os.PathLike[str]) -> None:
    """Lets libtpu write down the schedule of every program that this process compiles from now on.

    Has no effect once libtpu is loaded. Empty the folder between two programs: files do not say whose they are.
    """
    options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}".strip()


def clear_dump(folder: str | os.PathLike[str]) -> None:
    """Removes what was written for the program before."""
    for file in Path(folder).glob("*.txt"):
        file.unlink()


def read_schedule(folder: str | os.PathLike[str]) -> Schedule:
    """The schedule of the one program whose files lie in a folder.

    Raises:
      FileNotFoundError: no program's files are there.
    """
    files = {}
    for file in Path(folder).glob("*-final_bundles.txt"):
        if "schedule-analysis" not in file.name:
            files[re.sub(r"^\d+-(.*)-\d+-final_bundles\.txt$", r"\1", file.name)] = file
    if "TLP" not in files:
        raise FileNotFoundError(f"folder={str(folder)!r} holds no program's bundles: was start_dump called in time?")
    own = {name: _read(file) for name, file in files.items() if name != "TLP"}
    program = _read(files["TLP"])
    parts = Counter({"(program)": program.bundles})
    for name, times in program.calls.items():
        if name in own:
            parts[name] += times * own[name].bundles
    unknown = [name for name, part in (("(program)", program), *own.items()) if part.unknown and name in parts]
    return Schedule(sum(parts.values()), dict(parts.most_common()), tuple(unknown))


class _Part(NamedTuple):
    bundles: int
    calls: Counter[str]
    unknown: bool


def _read(file: Path) -> _Part:
    """One file: its bundles, and what it calls how often."""
    lines = [found for line in file.read_text(errors="replace").splitlines() if (found := _BUNDLE.match(line))]
    text = "\n".join(found.group(3) for found in lines)
    compared = {one: int(count) for one, _, count in _COMPARED.findall(text)}
    selected, tested, masked = (dict(form.findall(text)) for form in (_SELECTED, _TESTED, _MASKED))
    trips = {}  # of each region that a branch goes back to
    for predicate, region in _BRANCH.findall(text):
        scalar = tested.get(predicate, "")
        predicate = selected.get(masked.get(scalar, scalar), predicate)
        trips[region] = compared.get(predicate)

    total, calls, unknown, around = 0, Counter[str](), False, [1]  # around: how often, at each depth of loops
    for found in lines:
        here = len(found.group(2))
        if found.group(1) == "LB":
            known = [trips.get(region) for region in _STARTED.findall(found.group(3))]
            count = next((count for count in known if count), None)
            unknown = unknown or count is None
            around = [*around[:here], around[here - 1] * (count or 1)]
        times = around[min(here, len(around) - 1)]
        total += times
        for name in _CALL.findall(found.group(3)):
            calls[name] += times
    return _Part(total, calls, unknown)
