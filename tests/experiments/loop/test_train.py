"""The training loop: exact, resumable, the same on any number of devices and micro-batches."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoo
from experiments.causal.next_token import next_token_loss
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.masked_loss import masked_loss
from experiments.encoders.objectives import Target, make_objective
from experiments.encoders.shapes import small_encoder
from experiments.loop.metrics import read_metrics
from experiments.loop.optim import OptimConfig, make_optimizer, make_schedule
from experiments.loop.train import (
    Loss,
    Task,
    TrainConfig,
    TrainState,
    init_state,
    make_train_step,
    mean_loss,
    split_model,
    train,
)
from tests.numerics import assert_close
from zoo.models.build import build
from zoo.published.checkpoint_files import choose_checkpoint, read_arrays, read_record

VOCAB, LENGTH, ROWS = 11, 12, 8
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2)


def make_model(rngs=None, **overrides):
    config = zoo.CausalLMConfig(
        **{"d_model": 16, "n_layers": 2, "vocab_size": VOCAB, "pattern": "mamba attn/mlp", "dropout": 0.1} | overrides
    )
    return zoo.CausalLM(config, rngs=rngs or nnx.Rngs(0))


def loss(model, batch, rngs):
    logits = model(batch["tokens"], rngs=rngs)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return Loss(jnp.sum(nats * batch["weights"]), jnp.sum(batch["weights"]))


def loss_without_dropout(model, batch, rngs):
    return loss(model, batch, None)


class CountingBatches:
    """Batches that are a function of their number: text that counts upwards, with rows of unequal weight."""

    def __init__(self, spoil_at=None, empty_at=()):
        self.number, self.spoil_at, self.empty_at = 0, spoil_at, empty_at

    def __next__(self):
        rng = np.random.default_rng(self.number)
        self.number += 1
        text = (rng.integers(VOCAB, size=(ROWS, 1)) + np.arange(LENGTH + 1)) % VOCAB
        weights = (np.arange(LENGTH) < rng.integers(1, LENGTH, size=(ROWS, 1))).astype(np.float32)
        if self.number == self.spoil_at:
            weights[0, 0] = np.nan
        if self.number in self.empty_at:
            weights[:] = 0
        return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": weights}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def make_task(**batch_options):
    return Task(
        init=make_model,
        loss=loss,
        batches=CountingBatches(**batch_options),
        evaluate=lambda model: {"loss": mean_loss(model, loss, [next(CountingBatches())])},
        tokens_per_batch=ROWS * LENGTH,
    )


def make_config(steps, **overrides):
    options = {"batch_size": ROWS, "log_every": 1, "eval_every": 4, "save_every": 2, "tensorboard": False}
    return TrainConfig(steps=steps, **options | overrides)


@functools.cache
def make_start(accumulate, dtype, loss):
    """A jitted step and the state before the first."""
    model = make_model(dtype=dtype)
    optimizer = make_optimizer(OPTIM, 10, model)
    _, params, _ = split_model(model)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
    return make_train_step(model, loss, optimizer, accumulate=accumulate), state


def run_steps(n_steps, *, accumulate=1, dtype="float32", loss=loss_without_dropout):
    step, start = make_start(accumulate, dtype, loss)
    state, batches = jax.tree.map(jnp.copy, start), CountingBatches()  # a copy, for the step gives its memory away
    for _ in range(n_steps):
        state, metrics = step(state, next(batches))
    return state, metrics


def as_numbers(state):
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), state
    )


def assert_identical(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, as_numbers(actual), as_numbers(expected))


def test_state_holds_arrays_only():
    state, _ = run_steps(1)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, metrics = run_steps(3)
    cut, cut_metrics = run_steps(3, accumulate=4)
    assert_close(cut_metrics["loss"], metrics["loss"])
    # Adam divides by the root of the squared gradient: rounding of tiny gradients moves a parameter visibly.
    assert_close(cut.params, whole.params, tolerance=1e-3)


class Slope(nnx.Module):
    def __init__(self):
        self.slope = nnx.Param(jnp.float32(0.5))


def test_the_time_that_compiling_takes_is_not_in_the_speed(tmp_path, capsys, monkeypatch):
    late = [0.0]

    def slow_to_compile(model, batch, rngs):
        late[0] += 1000  # seconds, whenever the step is traced
        return Loss(jnp.square(model.slope[...]) * ROWS, jnp.float32(ROWS))

    clock = types.SimpleNamespace(perf_counter=lambda: late[0] + time.perf_counter())
    monkeypatch.setattr("experiments.loop.train.time", clock)
    task = make_task()._replace(init=lambda rngs: Slope(), loss=slow_to_compile, evaluate=lambda model: {"loss": 0.0})
    train(task, make_config(3, eval_every=9), OPTIM, tmp_path)
    speeds = [record.get("tokens_per_second") for record in read_metrics(tmp_path) if record["split"] == "train"]
    assert speeds[0] is None
    assert min(speeds[1:]) > ROWS * LENGTH / 100
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if line == "compiling the training step"] == [0]
    assert "left" in lines[2]
    assert "left" not in lines[1]


def loss_with_auxiliary(model, batch, rngs):
    slope = model.slope[...]
    return Loss(jnp.sum(slope**2 * batch["x"]), jnp.sum(batch["weights"]), auxiliary=3 * slope * jnp.mean(batch["x"]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_auxiliary_losses_are_trained_and_shown_apart(accumulate):
    batch = {"x": np.float32([1, 2, 3, 6]), "weights": np.float32([1, 1, 2, 4])}
    step = make_train_step(Slope(), loss_with_auxiliary, optax.sgd(1.0), accumulate=accumulate)
    optimizer_state = optax.sgd(1.0).init({"slope": jnp.float32(0.5)})
    state, metrics = step(
        TrainState(jnp.int32(0), {"slope": jnp.float32(0.5)}, optimizer_state, jax.random.key(0)), batch
    )
    # Rows 0 and 2 are the first micro-batch, 1 and 3 the second: 3 of the weights and 5 of them.
    mean = 3.0 if accumulate == 1 else (3 * 2 + 5 * 4) / 8
    assert metrics["loss"] == pytest.approx(0.5**2 * 12 / 8)
    assert metrics["auxiliary_loss"] == pytest.approx(3 * 0.5 * mean)
    assert state.params["slope"] == pytest.approx(0.5 - (2 * 0.5 * 12 / 8 + 3 * mean))
    total, weight = loss_with_auxiliary(Slope(), batch, None)[:2]
    assert mean_loss(Slope(), loss_with_auxiliary, [batch]) == pytest.approx(float(total / weight))


def test_dropout_is_a_function_of_key_and_step():
    assert_identical(run_steps(2, loss=loss)[0], run_steps(2, loss=loss)[0])
    assert run_steps(1, loss=loss)[1]["loss"] != run_steps(1)[1]["loss"]


def test_bfloat16_compute_keeps_float32_masters():
    state, metrics = run_steps(2, dtype="bfloat16")
    _exact, exact_metrics = run_steps(2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"] == pytest.approx(float(exact_metrics["loss"]), rel=2e-2)


@pytest.mark.parametrize(
    "stack", [pytest.param(zoo.stack_layers, marks=pytest.mark.slow), lambda params, model: params]
)
def test_weight_decay_leaves_out_what_says_so(stack):
    model = make_model(n_layers=4, scan_layers=True)
    optimizer = make_optimizer(dataclasses.replace(OPTIM, weight_decay=0.5, warmup_steps=0), 10, model)
    params = stack(split_model(model)[1], model)
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
    paths = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda u: bool(jnp.any(u)), updates))
    kept = {path[-1].key for path, moved in paths if not moved}
    assert kept == {"A_log", "D", "bias", "scale"}
    assert {path[-1].key for path, moved in paths if moved} == {"kernel", "embedding"}


def test_lr_scale_slows_a_parameter_down():
    class Pair(nnx.Module):
        def __init__(self):
            self.fast = nnx.Param(jnp.ones(3))
            self.slow = nnx.Param(jnp.ones(3), lr_scale=0.1)

    model = Pair()
    _, params, _ = split_model(model)
    optimizer = make_optimizer(dataclasses.replace(OPTIM, weight_decay=0.0, warmup_steps=0), 10, model)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["slow"], 0.1 * updates["fast"], rtol=1e-6)


def test_a_linear_schedule_falls_in_a_line():
    options = {"learning_rate": 1.0, "final_fraction": 0.1, "schedule": "linear"}
    for warmup, expected in ((10, (0, 0.5, 1, 0.55, 0.1)), (0, (1, 1 - 4.5 / 110, 1 - 9 / 110, 1 - 54 / 110, 0.1))):
        schedule = make_schedule(OptimConfig(warmup_steps=warmup, **options), 110)
        rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
        assert rates == pytest.approx(expected, abs=1e-6)


def test_a_trapezoid_stays_at_its_peak_until_the_last_tenth():
    options = {"learning_rate": 1.0, "final_fraction": 0.2, "schedule": "trapezoid", "warmup_steps": 10}
    schedule = make_schedule(OptimConfig(**options), 200)
    rates = [float(schedule(step)) for step in (0, 5, 10, 100, 180, 185, 200)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1 - 0.8 * 0.5, 0.2], abs=1e-6)


def test_schedule_warms_up_and_ends_at_its_fraction():
    schedule = make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), 110)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0, 0.5, 1, 0.55, 0.1], abs=1e-6)


def test_mean_loss_weighs_tokens_not_batches():
    model, source = make_model(), CountingBatches()
    batches = [next(source) for _ in range(3)]
    together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    sums = loss_without_dropout(model, jax.tree.map(jnp.asarray, together), None)
    assert mean_loss(model, loss, batches) == pytest.approx(float(sums.total / sums.weight), rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_of_padding_alone_leaves_the_parameters_bit_for_bit(accumulate):
    step, start = make_start(accumulate, "float32", loss_without_dropout)
    batches = CountingBatches(empty_at=(2,))
    before, _ = step(jax.tree.map(jnp.copy, start), next(batches))
    kept = as_numbers(before)
    after, metrics = step(before, next(batches))
    jax.tree.map(np.testing.assert_array_equal, as_numbers(after.params), kept.params)
    assert metrics["skipped"]
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0)
    assert int(after.step) == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after.opt_state))
    _, metrics = step(after, next(batches))
    assert not metrics["skipped"]
    assert np.isfinite(metrics["loss"])


def _padding_for(kind):
    """A model, its loss and a batch of nothing but padding, as the tasks make them."""
    tokens = np.zeros((2, 8), np.int32)
    if kind == "causal":
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens, "weights": np.zeros((2, 8), np.float32)}
        return make_model(), next_token_loss, batch
    encoder = dataclasses.replace(
        small_encoder(16, 1, 8), pattern="attn/mlp", vocab_size=VOCAB, attn=zoo.AttentionConfig(head_dim=8)
    )
    batch = {"tokens": tokens, "mask": np.zeros((2, 8), bool)}
    if kind == "masked":
        some = np.zeros((2, 3), np.int32)
        batch |= {"positions": some, "targets": some, "weights": np.zeros((2, 3), np.float32)}
        fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
        return zoo.MaskedLM(zoo.MaskedLMConfig(**fields), rngs=nnx.Rngs(0)), masked_loss, batch
    objective = make_objective(Target("classification", classes=("a", "b"), max_len=8), ByteTokenizer())
    model = build(objective.config(encoder, pool="mean", dropout=0.0), rngs=nnx.Rngs(0))
    batch |= {"token_types": tokens, "labels": np.zeros(2, np.int32), "weights": np.zeros(2, np.float32)}
    return model, objective.loss, batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "masked", "finetune"])
def test_the_loss_of_each_task_leaves_the_parameters_where_all_is_padding(kind):
    model, loss_of_task, batch = _padding_for(kind)
    optimizer = make_optimizer(OPTIM, 10, model)
    step = make_train_step(model, loss_of_task, optimizer)
    state = init_state(model, optimizer, jax.random.key(0))
    kept = as_numbers(state).params
    state, metrics = step(jax.tree.map(jnp.copy, state), batch)
    jax.tree.map(np.testing.assert_array_equal, as_numbers(state.params), kept)
    assert metrics["skipped"]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.opt_state))
    assert np.isnan(mean_loss(model, loss_of_task, [batch]))


def test_steps_without_targets_are_skipped_counted_and_said(tmp_path, capsys):
    train(make_task(empty_at=(1, 3)), make_config(4), OPTIM, tmp_path)
    said = capsys.readouterr().out
    assert "step 1 has nothing to learn from and is skipped" in said
    assert "2 of 4 steps had nothing to learn from and were skipped" in said
    records = [record for record in read_metrics(tmp_path) if record["split"] == "train"]
    assert [record["step"] for record in records if "loss" in record] == [2, 4]


def test_the_mean_loss_of_nothing_is_not_a_number():
    assert np.isnan(mean_loss(make_model(), loss, [next(CountingBatches(empty_at=(1,)))]))


def test_learns_to_count(tmp_path):
    finished = train(make_task(), make_config(60, eval_every=60, save_every=60), OPTIM, tmp_path)
    assert finished.model.config.vocab_size == VOCAB
    assert read_metrics(tmp_path)[-1]["loss"] < 0.7  # from log 11 = 2.4; 0.37 measured


def test_a_run_that_stops_and_goes_on_is_bitwise_the_run_that_did_not(tmp_path):
    whole = train(make_task(), make_config(7), OPTIM, tmp_path / "whole")
    # The second half starts at a checkpoint; the step of the cut (5) is not one, so step 5 is taken twice.
    task = make_task()
    with pytest.raises(RuntimeError, match="pulled"):
        train(task._replace(batches=_pull_plug_after(task.batches, 5)), make_config(7), OPTIM, tmp_path / "cut")
    resumed = train(make_task(), make_config(7), OPTIM, tmp_path / "cut")
    assert_identical(resumed.state, whole.state)
    timeless = lambda r: {k: v for k, v in r.items() if k != "tokens_per_second"}  # noqa: E731
    records = [[timeless(r) for r in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert records[0] == records[1]


@pytest.mark.slow
def test_a_run_goes_on_whether_its_layers_are_looped_or_not(tmp_path):
    """Checkpoints hold layers one by one; the state that is trained holds those of a loop together."""
    looped = make_task()._replace(init=functools.partial(make_model, pattern="-/mlp", scan_layers=True))
    plain = looped._replace(init=functools.partial(make_model, pattern="-/mlp"))
    tasks = {"whole": (looped, looped), "same": (looped, looped), "to plain": (looped, plain), "back": (plain, looped)}
    runs = {}
    for name, (before, after) in tasks.items():
        if name != "whole":
            cut = before._replace(batches=_pull_plug_after(CountingBatches(), 5))
            with pytest.raises(RuntimeError, match="pulled"):
                train(cut, make_config(7, ema=0.5), OPTIM, tmp_path / name)
        after = after._replace(batches=CountingBatches())
        runs[name] = train(after, make_config(7, ema=0.5), OPTIM, tmp_path / name)
    whole = runs["whole"].state
    assert "stacked_layers" in whole.params["backbone"]
    assert "stacked_layers" not in runs["to plain"].state.params["backbone"]
    assert_identical(runs["same"].state, whole)
    for name in ("to plain", "back"):
        for part in ("params", "average", "opt_state"):
            values = [zoo.unstack_layers(getattr(state, part)) for state in (runs[name].state, whole)]
            assert_close(*values, tolerance=1e-3, name=f"{name}, {part}")


@pytest.mark.slow
def test_a_step_is_a_program_of_the_same_size_whatever_the_depth():
    """Nothing is spelled out layer by layer, where even one operation on one array is 17 instructions a layer.

    A few dozen may come or go once: the compiler chooses by an array's size how to sum it (jaxlib 0.12.0 takes 36 fewer
    from 7 layers on). The optimiser layer by layer would be 630 a layer.
    """

    def instructions(n_layers):
        model = make_model(pattern="-/mlp", n_layers=n_layers, scan_layers=True, remat=True)
        optimizer = make_optimizer(OPTIM, 10, model)
        step = make_train_step(model, loss, optimizer, ema=0.5)
        state = init_state(model, optimizer, jax.random.key(0), average=True)
        program = jax.jit(step).lower(state, next(CountingBatches())).compile().as_text()
        return sum(" = " in line for line in program.splitlines())

    assert instructions(28) - instructions(4) < 2 * (28 - 4)


@pytest.mark.slow
def test_the_models_products_are_as_exact_as_the_flag_says(tmp_path):
    asked = []

    def noting(model, batch, rngs):
        asked.append(jax.config.jax_default_matmul_precision)
        return loss(model, batch, rngs)

    for precision in ("highest", None):
        config = make_config(1, matmul_precision=precision)
        train(make_task()._replace(loss=noting), config, OPTIM, tmp_path / str(precision))
        assert set(asked) == {precision}
        asked.clear()


class _pull_plug_after:
    def __init__(self, batches, count):
        self.batches, self.left = batches, count
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        if self.left == 0:
            raise RuntimeError("the plug was pulled")
        self.left -= 1
        return next(self.batches)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(make_task(), make_config(3), OPTIM, tmp_path)
    again = train(make_task(), make_config(3), OPTIM, tmp_path)
    assert not again.stopped
    assert_identical(again.state, first.state)


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 5 in .*; the last good checkpoint is step 4"):
        train(make_task(spoil_at=5), make_config(9), OPTIM, tmp_path)
    restored = train(make_task(), make_config(6), OPTIM, tmp_path)  # and nothing of it was saved
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(restored.state.params))


def test_nan_at_a_saving_step_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 4 .* checkpoint is step 2"):
        train(make_task(spoil_at=4), make_config(9), OPTIM, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8, "accumulate": 3}, "accumulate=3 must divide batch_size=8"),
        ({"steps": 0}, "steps=0, expected at least 1"),
    ],
)
def test_config_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.slow
def test_eight_devices_train_as_one_does(tmp_path):
    def rms(state):
        return [float(np.sqrt((np.asarray(x) ** 2).mean())) for x in jax.tree.leaves(state.params)]

    config = make_config(4, eval_every=4, save_every=4)
    on_one = train(make_task()._replace(loss=loss_without_dropout), config, OPTIM, tmp_path / "1")
    program = textwrap.dedent(
        """
        import json, sys, jax, numpy as np
        from flax import nnx
        from experiments.loop.train import train
        from tests.experiments.loop.test_train import *
        nnx.set_graph_mode(False)
        task = make_task()._replace(loss=loss_without_dropout)
        config = make_config(4, eval_every=4, save_every=4)
        finished = train(task, config, OPTIM, sys.argv[1])
        leaves = jax.tree.leaves(finished.state.params)
        assert all(leaf.sharding.num_devices == jax.device_count() for leaf in leaves)
        print(json.dumps([jax.device_count(), [float(np.sqrt((np.asarray(x) ** 2).mean())) for x in leaves]]))
        """
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(tmp_path / "8")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    count, on_eight = json.loads(out.splitlines()[-1])
    assert count == 8
    np.testing.assert_allclose(on_eight, rms(on_one.state), rtol=1e-3)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from flax import nnx
from experiments.loop.train import train
from tests.experiments.loop.test_train import *

nnx.set_graph_mode(False)
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
config = make_config(10 * kills, eval_every=4 * kills, save_every=3)
task = make_task()

def begin(name):
    process = os.fork()  # nothing of JAX has begun, so that what is imported may be shared
    if not process:
        status = 1
        try:
            train(task, config, OPTIM, folder / name)
            status = 0
        finally:
            os._exit(status)
    return process

assert os.waitpid(begin("whole"), 0)[1] == 0
killed, longest = 0, 4.0
while killed < kills:
    process = begin("killed")
    time.sleep(draw.uniform(0, longest))
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if status == 0:
        break  # it was faster
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
    killed += 1
assert os.waitpid(begin("killed"), 0)[1] == 0
print("killed", killed, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_is_bitwise_the_run_that_was_not(tmp_path):
    kills, seed = int(os.environ.get("KILLS", "100")), int(os.environ.get("KILLS_SEED", time.time_ns() % 10**9))
    print(f"KILLS={kills} KILLS_SEED={seed}")
    arguments = [sys.executable, "-c", KILLS, str(tmp_path), str(kills), str(seed)]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) >= kills // 2
    whole, killed = (choose_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert whole.name == killed.name == str(10 * kills)
    shapes = {name: shape for name, (_, shape) in read_record(whole)["arrays"].items()}
    states = [read_arrays(checkpoint / "state", shapes) for checkpoint in (whole, killed)]
    for name in shapes:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)
    timeless = lambda r: {k: v for k, v in r.items() if k != "tokens_per_second"}  # noqa: E731
    records = [[timeless(r) for r in read_metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert records[0] == records[1]
