"""Masked language models of several texts: what a batch holds, what is evaluated, and one text's model as a model."""

import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from experiments import bert, reuse
from experiments.encoders.load import load_encoder
from experiments.encoders.several_texts import Together, joined
from experiments.loop.metrics import last_evaluation
from experiments.loop.train import Task, split_model

SMALL = shlex.split(
    "pretrain tiny --model.d-model 16 --model.n-layers 1 --model.pattern attn/moe --model.moe.d-ff 8 "
    "--model.attn.head-dim 8 --data.tokenizer bytes --data.seq-len 32 --train.batch-size 4 --steps 4 --data.path a.txt "
    "--train.save-every 2 --train.eval-every 4 --eval-batches 2 --train.no-tensorboard --tasks b.txt --run-dir run"
)


class Counting:
    """Batches of two rows that say a number and how many there were before."""

    def __init__(self, number):
        self.number, self.done = number, 0

    def __next__(self):
        self.done += 1
        return {"tokens": np.full((2, 3), self.done), "task": np.full(2, self.number)}

    def get_state(self):
        return {"done": self.done}

    def set_state(self, state):
        self.done = state["done"]


def test_a_batch_has_rows_of_each_text_and_goes_on_where_it_was():
    together = Together([Counting(0), Counting(1)])
    next(together)
    state = together.get_state()
    batch = next(together)
    assert batch["task"].tolist() == [0, 0, 1, 1]
    assert batch["tokens"].shape == (4, 3)
    again = Together([Counting(0), Counting(1)])
    again.set_state(state)
    assert all(np.array_equal(value, batch[name]) for name, value in next(again).items())


def test_all_texts_are_evaluated_and_one_alone_is_itself():
    def task(loss):
        found = {"loss": loss, "accuracy": loss / 10}
        return Task(
            lambda rngs: None, lambda *_: None, Counting(0), lambda model: found, lambda loss: {"twice": 2 * loss}
        )

    one, two = task(1.0), task(3.0)
    assert joined([one]) is one
    means = {"loss": 2.0, "accuracy": 0.2, "twice": 4.0}
    assert joined([one, two]).evaluate(None) == means | {"loss_text0": 1.0, "loss_text1": 3.0}


@pytest.fixture
def texts(empty_folder):
    (empty_folder / "a.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(900)))
    (empty_folder / "b.txt").write_text("".join(f"{i} + {i} = {2 * i}; {i} * 3 = {3 * i}\n" for i in range(900)))
    return empty_folder


@pytest.mark.slow
def test_two_texts_are_learned_resumed_and_one_is_taken_out(texts, run_command):
    arguments = (*SMALL, "--model.moe.n-tasks", "2")
    status, out, err = run_command(bert, *arguments)
    assert status == 0, err
    assert "guessed right" in out
    last = last_evaluation(texts / "run")
    assert np.isclose(last["loss"], (last["loss_text0"] + last["loss_text1"]) / 2)
    model = load_encoder(texts / "run").model
    shutil.rmtree(texts / "run/checkpoints/4")
    status, out, err = run_command(bert, *arguments)
    assert (status, "resumed from step 2" in out) == (0, True), err
    again = load_encoder(texts / "run").model
    assert jax.tree.all(jax.tree.map(np.array_equal, split_model(again)[1], split_model(model)[1]))

    status, _, err = run_command(reuse, "task", "run", "out", "--task", "1")
    assert status == 0, err
    one, ids = zoo.from_pretrained(texts / "out", kind=zoo.MaskedLM), jnp.arange(5, 13)[None]
    np.testing.assert_allclose(one(ids), model(ids, task=jnp.array([1])), rtol=1e-5, atol=1e-5)
    (texts / "b.txt").write_text("something else\n" * 900)
    status, _, err = run_command(bert, *arguments, "--steps", "6")
    assert (status, "(train of text 1) changed since run has learned from it" in err) == (1, True), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.moe.n-tasks", "3"], "--model.moe.n-tasks 3, expected 1, a router for all texts, or 2"),
        (["--train.batch-size", "3"], "--train.batch-size 3, expected a multiple of 2"),
        (["--rows", "buckets"], "--rows buckets with --tasks, expected packed or padded"),
    ],
)
def test_texts_that_do_not_go_together_are_refused(arguments, message, texts, run_command):
    status, _, err = run_command(bert, *SMALL, *arguments)
    assert (status, message in err) == (1, True), err
    assert not (texts / "run").exists()
