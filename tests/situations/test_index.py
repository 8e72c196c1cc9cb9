"""The README of this folder says which test holds what users met; it names all that are here, and none that is not."""

import ast
import re
from pathlib import Path

from tests.places import ROOT

HERE = Path(__file__).parent


def functions_of(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_each_situation_is_held_by_a_test_that_is_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (HERE / "README.md").read_text())
    for file, name in named:
        assert name in functions_of(ROOT / "tests" / file), f"{file} has no {name}"
    rows = [line for line in (HERE / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert all("::" in row for row in rows if not row.startswith(("| what users met", "| ---")))
    here = {(path.name, name) for path in HERE.glob("test_*.py") for name in functions_of(path) if name[:4] == "test"}
    ours = {(file.removeprefix("situations/"), name) for file, name in named if file.startswith("situations/")}
    assert here - ours == {(Path(__file__).name, "test_each_situation_is_held_by_a_test_that_is_there")}
    assert ours <= here
