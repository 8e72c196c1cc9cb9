"""Several prompts go on together as each would alone, up to a stop string, and come out as lines of JSON."""

import functools
import io
import json

import pytest

from experiments import sample
from experiments.causal.continuations import first_of, until_stop
from tests.experiments.causal.made_runs import write_run

SHORT = ("--max-new-tokens", 12, "--seed", 3)


@pytest.fixture
def command(tmp_path, run_command):
    write_run(tmp_path / "run")
    return functools.partial(run_command, sample, "run")


def records(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_several_prompts_go_on_together_as_they_do_one_by_one(tmp_path, command):
    prompts = ("def ", "a longer prompt ", "")
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    status, out, err = command(*given, *SHORT, "--jsonl", "--samples", 2)
    assert status == 0, err
    together = records(out)
    assert [(row["number"], row["prompt"], row["sample"]) for row in together] == [
        (number, prompt, i) for i in range(2) for number, prompt in enumerate(prompts)
    ]
    assert {row["seed"] for row in together} == {3}
    status, out, err = command(*given, *SHORT, "--jsonl", "--samples", 2, "--batch-size", 1)
    assert records(out) == together
    # What is printed as it comes is the same text.
    status, out, err = command(*given, *SHORT)
    for row in together[:3]:
        assert f"{row['prompt']}{row['text']}" in out
    assert "--- prompt 2 ---" in out
    # The first prompt alone draws what it always did.
    status, out, err = command("--prompt", "def ", *SHORT)
    assert out == f"def {together[0]['text']}\n"


def test_prompts_come_from_files_and_standard_input(tmp_path, command, monkeypatch):
    expected = records(command("--prompt", "one", "--prompt", 'two "2"', *SHORT, "--jsonl")[1])
    (tmp_path / "prompts.txt").write_text('one\ntwo "2"\n')
    (tmp_path / "prompts.jsonl").write_text(json.dumps("one") + "\n" + json.dumps({"prompt": 'two "2"'}) + "\n")
    for name in ("prompts.txt", "prompts.jsonl"):
        status, _, err = command("--prompts-file", name, *SHORT, "--out", "out.jsonl", "--overwrite")
        assert status == 0, err
        assert records((tmp_path / "out.jsonl").read_text()) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    status, out, err = command("--prompt", "-", *SHORT, "--jsonl")
    assert records(out)[0]["text"] == expected[0]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO('one\ntwo "2"\n'))
    status, out, err = command("--prompts-file", "-", *SHORT, "--jsonl")
    assert records(out) == expected


def test_a_stop_string_ends_a_text_and_is_not_part_of_it(command):
    (whole,) = records(command("--prompt", "def ", *SHORT, "--jsonl")[1])
    assert whole["finished"] == "length"
    stop = whole["text"][4:6]
    (row,) = records(command("--prompt", "def ", *SHORT, "--jsonl", "--stop", "never there", "--stop", stop)[1])
    assert (row["finished"], row["text"]) == ("stop", whole["text"][: whole["text"].index(stop)])
    assert command("--prompt", "def ", *SHORT, "--stop", stop)[1] == f"def {row['text']}\n"


@pytest.mark.parametrize(
    ("stop", "expected"), [((), "abcabd"), (("abd",), "abc"), (("x", "ca"), "ab"), (("bdx",), "abcabd"), (("a",), "")]
)
def test_a_stop_string_is_found_across_pieces(stop, expected):
    assert "".join(until_stop(["ab", "c", "", "ab", "d"], stop)) == expected
    assert ("abcabd"[: first_of("abcabd", stop)]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts-file", "missing.txt"], "missing.txt"),
        (["--prompts-file", "empty.txt"], "--prompts-file empty.txt has no prompts"),
        (["--prompts-file", "bad.jsonl"], "bad.jsonl line 1 is '{\"text\": 1}', expected a string"),
        (["--prompt", "x", "--prompts-file", "empty.txt"], "--prompt and --prompts-file exclude each other"),
        (["--out", "out.txt"], "out.txt, expected a name that ends in .jsonl"),
        (["--stop", ""], "--stop"),
        (["--samples", "0"], "--samples 0"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, command, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    status, _, err = command(*arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err
