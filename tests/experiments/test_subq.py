"""All commands by one name, and what is in the package."""

import importlib
import sys
import tomllib

import pytest

import zoo
from experiments import subq
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


def test_the_installed_command_runs(monkeypatch, capsys):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["subq"]
    module, _, function = entry.partition(":")
    monkeypatch.setattr(sys, "argv", ["subq", "--version"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert not ended.value.code
    assert zoo.__version__ in capsys.readouterr().out
