"""All commands by one name, and what is in the package."""

import ast
import importlib
import re
import sys
import tomllib

import pytest

import zoo
from experiments import sample, score, subq
from experiments.data import fetch
from tests.places import ROOT


def test_each_command_is_there():
    for module in subq.COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_every_command_of_a_file_has_its_name():
    sources = {path.stem: path.read_text() for path in (ROOT / "experiments").glob("*.py")}
    files = {name for name, text in sources.items() if "\ndef main(" in text} - {"subq"}
    rooms = {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py")}
    assert {*subq.COMMANDS} == files | rooms


def test_the_command_line_is_handed_on(run_command):
    status, out, _ = run_command(subq, "causal-lm", "--help")
    assert status == 0
    assert "usage: python -m experiments.causal_lm" in out
    assert run_command(subq, "--version")[1] == f"subquadratic-zoo {zoo.__version__}\n"
    assert "subq COMMAND --help" in run_command(subq)[1]
    status, _, err = run_command(subq, "smaple")
    assert status == 1
    assert "unknown command 'smaple', did you mean 'sample'" in err


def test_hints_call_commands_as_they_were_called(empty_folder, monkeypatch, capsys):
    def said(*argv):
        monkeypatch.setattr(sys, "argv", [*argv])
        with pytest.raises(SystemExit):
            subq.cli()
        return "".join(capsys.readouterr())

    for program, name in (("/usr/bin/subq", "subq "), ("experiments/subq.py", "python -m experiments.")):
        text = said(program, "score", "--help")
        assert f"usage: {name}score " in text
        assert f"    {name}score runs/causal_lm/tiny lines.txt --lines" in text
        assert f"(flags: {name}score --help)" in said(program, "score")
        assert f"{name}bert finetune tiny" in said(program, "bert")
        monkeypatch.setattr("experiments.data.fetch.main", lambda: fetch.path("headlines"))
        assert f"; {name}data fetch headlines" in said(program, "data")


def test_hints_are_printed_as_they_were_called():
    for path in (ROOT / "experiments").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "print(" not in line or "python -m exp" not in line or "print(flags.as_called(" in line, path


@pytest.mark.parametrize("module", [sample, score])
def test_help_has_an_example_a_line(module, run_command):
    lines = run_command(module, "--help")[1].splitlines()
    examples = [line for line in module.__doc__.splitlines() if "python -m experiments." in line]
    assert len(examples) > 3
    assert set(examples) <= set(lines)


def test_examples_that_help_shows_are_set_in():
    """tyro joins the lines of a paragraph, but for those that are set in."""
    for path in (ROOT / "experiments").rglob("*.py"):
        source = path.read_text()
        if "description=__doc__" in source:
            for line in (ast.get_docstring(ast.parse(source)) or "").splitlines():
                assert not re.match(r"(python -m|subq|[a-z]+ .*\| python -m) ?", line), f"{path}: {line}"


def test_the_installed_command_runs(monkeypatch, capsys):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["subq"]
    module, _, function = entry.partition(":")
    monkeypatch.setattr(sys, "argv", ["subq", "--version"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert not ended.value.code
    assert zoo.__version__ in capsys.readouterr().out
