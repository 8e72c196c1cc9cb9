"""A model is asked in the words of its chat template, and so are a run that is begun from it, and what that exports."""

import json

import pytest

from experiments import causal_lm, convert, sample
from experiments.causal.chat import keep_chat
from experiments.causal.load import load_published
from experiments.data.corpus import DataConfig
from experiments.data.tokenizers import save_tokenizer
from experiments.loop import runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import split_model
from tests.experiments.causal.made_chats import write_chat_model

SHORT = ("--max-new-tokens", 6, "--seed", 3)
SAID = "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nplain words<|im_end|>\n<|im_start|>assistant\n"


def write_run(model, folder):
    """A run that is begun from a published folder, before its first step."""
    model, tokenizer, _, spec = load_published(str(model))
    keep_chat(spec, folder, tokenizer, model.config.vocab_size)
    save_tokenizer(tokenizer, folder)
    runs.begin(causal_lm.Config(model=model.config, data=DataConfig(tokenizer=spec)), folder, model.config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": split_model(model)[1]}, data_state={})


@pytest.mark.slow
def test_a_prompt_becomes_the_words_of_a_chat_in_every_folder(tmp_path, run_command):
    tokenizer = write_chat_model(tmp_path / "model")
    expected = tokenizer.encode(SAID, add_special_tokens=False).ids
    assert expected[0] == 1
    write_run(tmp_path / "model", tmp_path / "run")
    status, _, err = run_command(convert, "run", "out")
    assert status == 0, err
    said = {}
    for name in ("model", "run", "out"):
        config = sample.Config(run_dir=tmp_path / name, chat=True, system="Be brief.", prompt="plain words")
        assert sample.load(config)[2] == expected, name
        assert {*sample.open_model(config).ends.closing} == {3, 0}, name
        status, out, err = run_command(sample, name, "--chat", "--prompt", "plain words", *SHORT, "--jsonl")
        assert status == 0, err
        said[name] = json.loads(out)
    assert said["model"] == said["run"] == said["out"]
    assert said["model"]["messages"] == [{"role": "user", "content": "plain words"}]
    # What is printed as it comes is the answer alone.
    assert run_command(sample, "model", "--chat", "--prompt", "plain words", *SHORT)[1] == said["model"]["text"] + "\n"


def test_conversations_of_several_turns_come_from_a_file(tmp_path, run_command):
    tokenizer = write_chat_model(tmp_path / "model")
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in ({"messages": turns}, {"prompt": "b"}, "c"))
    )
    config = sample.Config(model="model", chat=True, prompts_file="asked.jsonl")
    text = "".join(f"<|im_start|>{turn['role']}\na<|im_end|>\n" for turn in turns)
    assert sample.load(config)[2] == tokenizer.encode(f"<s>{text}<|im_start|>assistant\n").ids
    status, out, err = run_command(sample, "model", "--chat", "--prompts-file", "asked.jsonl", *SHORT, "--jsonl")
    assert status == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plain", "--chat", "--prompt", "a"), "plain has no chat template, so that it has no --chat"),
        (("nothing", "--chat", "--prompt", "a"), "nothing holds no run"),
        (("model", "--chat"), "--chat, expected a --prompt"),
        (("model", "--prompt", "a", "--system", "b"), "--system belongs to --chat"),
        (("model", "--prompts-file", "asked.jsonl"), "asked.jsonl line 1 has messages; --chat"),
        (("model", "--chat", "--prompts-file", "asked.jsonl", "--system", "b"), "conversation 1 begins with a system"),
        (("model", "--chat", "--prompts-file", "bad.jsonl"), "bad.jsonl line 1: messages, expected a list of objects"),
        (("model", "--chat", "--prompts-file", "deep.jsonl"), "deep.jsonl line 1 is not JSON"),
        (("loops", "--chat", "--prompt", "a"), "it refuses the messages: never"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, run_command, arguments, message):
    for name in ("model", "plain", "loops"):
        write_chat_model(tmp_path / name)
    (tmp_path / "plain" / "tokenizer_config.json").unlink()
    (tmp_path / "loops" / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "system", "content": "a"}]}\n')
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"content": "a"}]}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    status, _, err = run_command(sample, *arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err


@pytest.mark.slow
def test_a_run_that_is_begun_from_a_chat_model_keeps_its_template(tmp_path, run_command):
    write_chat_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a few plain words " * 200)
    small = ("--data.path", "text.txt", "--data.seq-len", 16, "--train.batch-size", 2, "--steps", 1, "--prompt=")
    arguments = ("tiny", "--init", "model", *small, "--eval-batches", 1, "--run-dir", "run", "--train.no-tensorboard")
    status, _, err = run_command(causal_lm, *arguments)
    assert status == 0, err
    assert sample.open_model(sample.Config(run_dir=tmp_path / "run", chat=True)).ends.closing == (3, 0)
