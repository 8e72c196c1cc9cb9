"""Distillation as a user runs it: by its command line, stopped and resumed; and what its stages train and measure."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import causal_lm, distill
from experiments.loop import flags
from experiments.loop.metrics import read_metrics

SMALL = [
    *("--data.seq-len", "32", "--train.batch-size", "4", "--eval-batches", "2", "--train.no-tensorboard"),
    *("--train.log-every", "1", "--train.save-every", "2", "--train.eval-every", "2", "--teacher-steps", "4"),
    *("--layers.steps", "3", "--qkv.steps", "0", "--logits.steps", "3", "--pattern", "attn linear_attn"),
]
TEACHER = zoo.CausalLMConfig(
    d_model=16, n_layers=2, pattern="attn/mlp", attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(d_ff=16)
)

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def command(run_command):
    """Runs the command in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, distill)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    return path


@pytest.fixture
def small_teacher(monkeypatch):
    """A teacher that is trained in the same command is smaller than the command's own."""
    make = distill.teacher_config
    monkeypatch.setattr(distill, "teacher_config", lambda config: dataclasses.replace(make(config), model=TEACHER))


def parameters(model):
    return {".".join(map(str, path)): np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.usefixtures("small_teacher")
def test_distils_stops_resumes_and_keeps_what_is_frozen(text, tmp_path, command):
    arguments = ("tiny", "--data.path", text, *SMALL)
    status, out, err = command(*arguments, "--run-dir", "run")
    assert status == 0, err
    run = tmp_path / "run"
    assert "attn/mlp -> attn/mlp linear_attn/mlp: " in out
    files = {"index.html", "result.txt", "results.json", "stages.png", "config.json", "inputs.json"}
    assert files | {"teacher", "layers", "logits", "student"} == {path.name for path in run.iterdir()}
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert list(rows) == ["teacher", "random", "seeded", "layers", "logits"]
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert rows["layers"]["layer_error"] < rows["seeded"]["layer_error"]
    assert [line.split()[0] for line in out.split("on held-out text:")[1].splitlines()[2:7]] == list(rows)
    held_out = [record for record in read_metrics(run / "logits") if record["split"] == "validation"][-1]
    assert held_out["loss"] == held_out["kl"] == rows["logits"]["kl"]

    # Nothing but the mixer of layer 1 was trained, weight decay or not, and all of it was.
    student, teacher = (parameters(causal_lm.load_run(run / name)[0]) for name in ("student", "teacher"))
    for name, value in student.items():
        inside = name.startswith("backbone.layers.1.mixer.")
        if not inside or name in teacher:
            assert (value.tobytes() == teacher[name].tobytes()) != inside, name
    saved = json.loads((run / "layers/checkpoints/3/record.json").read_text())["arrays"]
    names = {name.split(".")[6] for name in saved if name.startswith("params.")}
    assert names == {"A_log", "dt_bias", "dt_proj", "conv1d", "gate_proj", "norm"}

    # As if stopped in the last stage: it ends at the same, bit for bit.
    for name in ("logits/checkpoints/3", "student"):
        shutil.move(run / name, tmp_path / name.replace("/", "-"))
    status, out, err = command(*arguments, "--run-dir", "run")
    assert (status, "resumed from step 2 in run/logits" in out) == (0, True), err
    again = parameters(causal_lm.load_run(run / "student")[0])
    assert all(value.tobytes() == again[name].tobytes() for name, value in student.items())
    assert json.loads((run / "results.json").read_text())["rows"] == rows

    # The student is a run of experiments.causal_lm, and so a teacher: what is left of its attention can go too.
    again = distill.load_teacher("run/student").model
    assert distill.chosen_layers("linear_attn", again.config) == [0]


@pytest.mark.slow
@pytest.mark.usefixtures("small_teacher")
def test_a_student_of_which_nothing_is_copied_starts_as_the_random_one(text, tmp_path, command):
    random = ("--init", "random", "--layers.steps", "1", "--logits.steps", "0")
    status, _, err = command("tiny", "--data.path", text, *SMALL, *random, "--run-dir", "run")
    assert status == 0, err
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert list(rows) == ["teacher", "random", "seeded", "layers"]
    assert rows["seeded"] == rows["random"] != rows["layers"]


def test_a_config_comes_back_from_json(tmp_path):
    for _, config in distill.PRESETS.values():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(distill.Config, tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a folder nor a name on the hub (owner/name)"),
        (["--pattern", "lin_attn"], "unknown mixer 'lin_attn', did you mean 'linear_attn'?"),
        (["--pattern", "attn mamba"], "--pattern 'attn mamba', expected the words attn and linear_attn"),
        (["--pattern", "linear_attn/mlp"], "--pattern 'linear_attn/mlp', expected the words"),
        (["--pattern", "attn"], "--pattern 'attn' converts none of the teacher's layers, 'attn/mlp'"),
        (["--layers.steps", "0", "--logits.steps", "0"], "no stage has steps, expected some in --layers.steps"),
        (["--layers.steps", "-1"], "steps=-1, expected at least 0"),
        (["--init", "scratch"], "invalid choice 'scratch'"),
        (["--data.path", "missing.txt"], "missing.txt"),
        (["--mixer.d-conv", "0"], "d_conv=0, expected at least 1"),
        (["--warmup-fraction", "1"], "--warmup-fraction 1.0, expected 0 <= warmup-fraction < 1"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message, text, tmp_path, command):
    status, _, err = command("tiny", "--data.path", text, *SMALL, "--run-dir", "run", *arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_attention_or_of_another_kind_is_named(tmp_path):
    zoo.save_pretrained(
        zoo.CausalLM(zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=24), rngs=nnx.Rngs(0)), tmp_path / "mamba"
    )
    with pytest.raises(ValueError, match=r"mamba has no tokenizer\.json, expected the teacher's tokenizer"):
        distill.load_teacher(tmp_path / "mamba")
    with pytest.raises(ValueError, match="--pattern 'linear_attn' converts none of the teacher's layers, 'mamba'"):
        distill.chosen_layers("linear_attn", zoo.CausalLMConfig(pattern="mamba"))
    assert distill.chosen_layers("attn linear_attn*3", zoo.CausalLMConfig(n_layers=6, pattern="attn/mlp")) == [
        1,
        2,
        3,
        5,
    ]
