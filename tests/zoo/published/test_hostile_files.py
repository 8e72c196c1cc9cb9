"""Files that somebody made to do harm: one line each, in little memory and time, and nothing in them runs."""

import json
import subprocess
import sys

import pytest

from tests.places import ROOT
from tests.zoo.published.hostile_files import CASES


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What loading each says, all in one process with little memory."""
    root = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-m", "tests.zoo.published.hostile_files", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(root.rglob("ran"))
    assert not (ROOT / "ran").exists()
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_line_that_names_the_file(case, said):
    kind, message, seconds = said[case]
    assert kind in ("ValueError", "FileNotFoundError"), message
    assert "\n" not in message
    assert len(message) < 1500
    assert str(list(CASES).index(case)) in message  # its folder
    assert seconds < 20
