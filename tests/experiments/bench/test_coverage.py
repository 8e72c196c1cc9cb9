"""The table of what works with what: its cells are the commands' own ends."""

from experiments.bench import coverage
from experiments.bench.coverage import TASKS, Line, call, format_table, try_out


def test_a_command_ends_with_yes_or_with_why_not(empty_folder):
    assert call("convert --help") == "yes"
    assert call("convert nowhere out") == "nowhere is neither a folder nor a name on the hub (owner/name)"


def test_every_task_is_trained_saved_exported_and_used_in_this_order():
    calls = []

    def note(command, *more):
        calls.append((*command.split(), *more))
        return "yes" if command != "convert run official --layout official" else "no layout"

    line = try_out("masked", "attn/mlp, as BERT", note)
    assert line.cells == {
        "train": "yes", "save, load": "yes", "transformers": "yes", "official": "no layout", "use": "yes"
    }  # fmt: skip
    assert calls[0][:3] == ("bert", "pretrain", "tiny")
    assert calls[0][calls[0].index("--model.pattern") + 1] == "attn/mlp"
    assert "--model.norm-place" in calls[0]
    assert calls[1] == ("convert", "run", "out")
    assert calls[-1] == ("bert", "embed", "out", "texts.txt", "out.npy")
    failed = try_out("masked", "mamba", lambda *command: "no")
    assert failed.cells == {"train": "no"}


def test_reasons_stand_below_the_table_once():
    lines = [
        Line("a", "mamba", {"train": "yes", "use": "why not"}),
        Line("b", "attn/mlp, as BERT", {"train": "why not"}),
    ]
    assert format_table(lines).splitlines() == [
        "| task | family | train | use |",
        "| --- | --- | --- | --- |",
        "| a | `mamba` | ✓ | (1) |",
        "| b | `attn/mlp`, as BERT | (1) |  |",
        "",
        "(1) why not  ",
    ]


def test_the_files_are_there_that_the_commands_name(tmp_path):
    coverage.write_data(tmp_path)
    for task in TASKS.values():
        words = f"{task.train} {task.use}".split()
        for word in words:
            if word.endswith((".csv", ".jsonl", ".txt", ".png")) and not word.startswith("out"):
                assert (tmp_path / word).stat().st_size > 50, word
    assert (tmp_path / "search/qrels/train.tsv").read_text().count("\n") > 10
