"""Modules that learn one by one in place of their teacher's, as a user has them do it."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import causal_lm
from experiments.causal.module_wise import ModulesConfig, ModuleWise
from experiments.data.tokenizers import ByteTokenizer, save_tokenizer
from experiments.loop.metrics import read_metrics
from tests.numerics import assert_close

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 7)))
BATCH = {"tokens": IDS, "segment_ids": jnp.zeros_like(IDS), "weights": jnp.ones(IDS.shape)}
CONFIG = zoo.CausalLMConfig(d_model=8, n_layers=3, pattern="mamba", vocab_size=257)
FLAGS = ["tiny", "--data.path", "my.txt", "--data.seq-len", "16", "--eval-batches", "1", "--train.batch-size", "2"]
FLAGS += ["--prompt=", "--train.no-tensorboard", "--optim.warmup-steps", "0", "--run-dir", "run"]
FLAGS += [
    "--model.d-model",
    "8",
    "--model.n-layers",
    "2",
    "--model.pattern",
    "m2/monarch",
    "--model.monarch.d-ff",
    "16",
]


def make(seed, **options):
    return zoo.CausalLM(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("match", ["hidden", "logits"])
def test_the_loss_is_that_of_the_teacher_with_each_module_in_its_place(match):
    teacher, student = make(0), make(1, n_layers=2)
    modules = ModuleWise(ModulesConfig(steps=1, match=match), teacher, student)
    student = modules.taught.student
    blocks = [list(model.backbone.layers) for model in (teacher, student)]
    # Two modules: one block, then two of the teacher's; one block each of the student's.
    replaced = [[blocks[1][0], *blocks[0][1:]], [blocks[0][0], blocks[1][1]]]
    stream = [teacher.embed(IDS)]
    for block in blocks[0]:
        stream.append(block(stream[-1]))
    if match == "hidden":
        enters, gives = (stream[0], stream[1]), (stream[1], stream[3])
        ratios = [
            jnp.sum((student.backbone.layers[i](x) - y) ** 2) / jnp.sum((y - x) ** 2)
            for i, (x, y) in enumerate(zip(enters, gives, strict=True))
        ]
    else:
        log_p, ratios = jax.nn.log_softmax(teacher(IDS)[..., :257]), []
        for stack in replaced:
            x = stream[0]
            for block in stack:
                x = block(x)
            log_q = jax.nn.log_softmax(teacher.head(teacher.backbone.norm_f(x))[..., :257])
            ratios.append(jnp.sum(jnp.exp(log_p) * (log_p - log_q)) / IDS.size)
    loss = modules.loss(modules.taught, BATCH, None)
    assert_close(loss.total / loss.weight, sum(ratios) / 2)
    assert loss.weight == IDS.size
    assert loss.auxiliary is None


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teacher = make(0)
    modules = ModuleWise(ModulesConfig(steps=1), teacher, teacher)
    assert modules.loss(modules.taught, BATCH, None).total == 0


@pytest.mark.slow
def test_modules_learn_then_the_whole_and_a_stopped_run_goes_on(run_command, empty_folder):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    zoo.save_pretrained(make(0), empty_folder / "large")
    save_tokenizer(ByteTokenizer(), empty_folder / "large")
    arguments = [*FLAGS, "--teacher", "large", "--modules.steps", "20", "--steps", "4", "--train.save-every", "2"]
    status, out, err = run_command(causal_lm, *arguments)
    assert status == 0, err
    assert "modules by themselves: hidden, 20 steps" in out
    run = empty_folder / "run"
    losses = [record["loss"] for record in read_metrics(run / "modules") if record["split"] == "train"]
    assert losses[-1] < losses[0]
    model = zoo.from_pretrained(run)
    assert model.config.pattern == "m2/monarch"

    # As if stopped behind the modules: the same again.
    shutil.move(run / "checkpoints", empty_folder / "checkpoints")
    status, out, err = run_command(causal_lm, *arguments)
    assert (status, "resumed from step 20 in run/modules" in out) == (0, True), (out, err)
    again = zoo.from_pretrained(run)
    pairs = zip(*(jax.tree.leaves(nnx.state(each)) for each in (model, again)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modules.steps", "2"], "--modules.steps 2 without --teacher"),
        (
            ["--modules.steps", "2", "--teacher", "large", "--model.d-model", "16"],
            "has shape (16,) in the student, expected the teacher's, (8,)",
        ),
        (["--modules.steps", "2", "--teacher", "large", "--modules.count", "3"], "n_parts=3, expected 1 to 2"),
    ],
)
def test_modules_without_a_place_are_refused_before_a_run_begins(arguments, message, run_command, empty_folder):
    (empty_folder / "my.txt").write_text("".join(f"line {i}\n" for i in range(2000)))
    zoo.save_pretrained(make(0), empty_folder / "large")
    save_tokenizer(ByteTokenizer(), empty_folder / "large")
    status, _, err = run_command(causal_lm, *FLAGS, *arguments)
    assert (status > 0, message in err) == (True, True), err
    assert not (empty_folder / "run").exists()
