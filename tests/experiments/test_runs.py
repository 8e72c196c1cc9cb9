"""Runs listed and compared by command."""

import csv
import dataclasses
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from experiments import runs
from experiments.loop.run_server import RunServer
from tests.experiments.loop.test_history import TINY, write_run

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def folders():
    other = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, pattern="attn/mlp"))
    write_run(Path("runs/causal_lm/tiny"), [3.0, 1.0, 2.0])
    write_run(Path("runs/causal_lm/other"), [2.5, 2.25], config=other)
    write_run(Path("runs/vit/tiny"), [1.0], config=None, name="accuracy")
    return Path("runs")


def test_runs_are_listed_with_what_is_wrong(folders, run_command):
    status, out, err = run_command(runs, "--csv", "runs.csv")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    tiny = lines["runs/causal_lm/tiny"]
    for said in ("causal_lm ", " mamba ", " 30/350 ", "loss 2, bits_per_byte 4 ", "loss 1 at 20 "):
        assert said in tiny
    assert "    ! there is no config.json\n" in out
    with Path("runs.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert (table["runs/causal_lm/other"]["pattern"], table["runs/vit/tiny"]["command"]) == ("attn/mlp", "?")
    assert run_command(runs, "runs/vit")[1].count("runs/") == 1


def test_runs_are_compared_in_a_table_and_a_picture(folders, run_command):
    names = ("runs/causal_lm/tiny", "runs/causal_lm/other", "runs/vit/tiny")
    status, out, err = run_command(runs, "compare", *names, "--csv", "table.csv", "--plot", "picture.png")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["run"][1:] == ["causal_lm/tiny", "causal_lm/other", "vit/tiny"]
    assert lines["model.pattern"][1:] == ["mamba", "attn/mlp", "-"]
    assert lines["bits_per_byte"][1:] == ["4", "4.5"]
    assert lines["lowest"][-3:] == ["1", "2.25", "1"]
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    with Path("table.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["2.0", "2.25", "1.0"]

    status, out, _ = run_command(runs, "compare", *names[:2])
    assert status == 0
    differing = [line.split()[0] for line in out.splitlines()]
    assert differing == [
        "run",
        "command",
        "model.pattern",
        "steps",
        "loss",
        "bits_per_byte",
        "lowest",
        "at",
        "picture:",
    ]
    assert Path("comparison.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["compare", "runs/vit/tiny"], "expected the folders of two runs or more"),
        (["compare", "runs/vit/tiny", "runs/vit"], "runs/vit holds no run"),
        (["compare", "empty", "empty"], "none of these runs has metrics to draw"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folders, run_command):
    write_run(Path("empty"), [])
    status, _, err = run_command(runs, *arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_runs(empty_folder, run_command):
    assert run_command(runs, ".") == (0, "there are no runs under .\n", "")


def test_runs_are_shown_in_a_browser(folders):
    with RunServer(folders, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:

            def get(target):
                with urllib.request.urlopen(server.address + target, timeout=60) as answer:
                    return answer.read().decode()

            listed = get("")
            assert listed.count('type="checkbox"') == 3
            assert "! there is no config.json" in listed
            assert 'href="/run/causal_lm/tiny"' in listed
            assert "loss 1 at 20" in listed
            one = get("run/causal_lm/tiny")
            assert "<svg" in one
            assert 'href="/"' in one
            assert 'http-equiv="refresh"' in one
            both = get("compare?run=causal_lm/tiny&run=causal_lm/other")
            assert "attn/mlp" in both
            assert "<svg" in both
            for nowhere in ("run/nothing", "run/..", "run/causal_lm", "run/%2Fetc", "compare", "other"):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    get(nowhere)
        finally:
            server.shutdown()


def test_a_page_is_written_again_and_escapes_what_it_shows(folders, run_command):
    folder = Path("runs/causal_lm/tiny")
    (folder / "result.txt").write_text("<script>alert(1)</script> & more")
    (folder / "starts.json").write_text('[{"when": "yesterday"}, 3]')
    assert run_command(runs, "page", str(folder)) == (0, f"page: {folder}/index.html\n", "")
    text = (folder / "index.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert "<script" not in text
    assert "<h2>Starts</h2>" not in text
    assert "d_model" in text
    assert not re.search(r'(src|href)="?http', text)  # whole in itself
    assert run_command(runs, "page", "nowhere")[0] == 1
