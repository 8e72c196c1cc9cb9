"""The one training loop: BERT, ViT and causal language models run through it, on one device or many.

    state, step = ...                 arrays only, and one jitted function of them
    for each batch: state, metrics = step(state, batch)

NNX modules are split once into a graph and their arrays; from there on only `jax.jit`, `jax.value_and_grad` and
`jax.lax.scan` transform, and the state that they carry is what a checkpoint holds. A run that was killed and started
again goes on bit for bit as if it had not been: state, key and the data pipeline's position come back exactly.

Where a model runs equal layers in loops (`scan_layers`), the state has their arrays stacked, so that the step is the
same program at any depth. Checkpoints hold every layer by itself all the same.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zoo
from experiments.loop import distributed
from experiments.loop.disk_space import bytes_of, said_of_space
from experiments.loop.divergence import step_back
from experiments.loop.extending import learning_rate_of, said_of_length, said_of_rate, said_of_warmup
from experiments.loop.fingerprints import Changeable
from experiments.loop.flags import UsageError, alias, usage_errors
from experiments.loop.host_arrays import HostArray, Stack, to_devices, to_host, wanted
from experiments.loop.mesh import by_rows, check_rows, current_mesh, everywhere, placed, spread
from experiments.loop.metrics import (
    Progress,
    format_line,
    peak_flops,
    plot_metrics,
    read_metrics,
    set_metrics_aside,
)
from experiments.loop.optim import OptimConfig, make_optimizer, make_schedule
from experiments.loop.rescue import said
from experiments.loop.run_files import RunFiles
from experiments.loop.run_lock import run_lock
from experiments.loop.run_page import write_page
from experiments.loop.sharding import is_cut, make_model, shardings_of_state, specs_of_params, specs_of_state
from experiments.loop.starts import record_start
from experiments.loop.stopping import AgreedStop, stop_signals

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, how often to look, and what to keep."""

    steps: Annotated[int, alias("--steps")] = 1000
    """Optimiser steps of the whole run."""
    batch_size: int = 16
    """Rows a step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step: the gradient is that of the whole batch, the memory that of one."""
    ema: float = 0.0
    """Decay of a running mean of the parameters, which is evaluated and used in their place. It starts at 1/11 and
    rises to this. 0: none."""
    carry_state: bool = False
    """Whether rows go on where the step before ended, from the state it left (truncated backpropagation in time)."""
    matmul_precision: Literal["high", "highest"] | None = None
    """How exactly the model's layers multiply float32, as `jax.default_matmul_precision` takes it. None: as the
    platform does, in bfloat16 on a TPU, in TF32 on a GPU. Operations decide by themselves: `ssm.precision`."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data and dropout."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 200
    """Steps between evaluations on held-out data; each is followed by a checkpoint."""
    save_every: int = 200
    """Steps between checkpoints. There is always one at the end."""
    keep_last: int = 2
    """Checkpoints to keep, beside the best one."""
    tensorboard: bool = True
    """Whether to write TensorBoard files beside the JSON lines."""
    wandb: str | None = None
    """Weights & Biases project to log to, where wandb is installed."""
    rescue: Annotated[Path | None, alias("--rescue")] = None
    """Folder that the run goes on in, under its name and `.rescued`, once its own cannot be written any more: a full or
    read-only disk, say. None: beside its own. Where that cannot be written either, in the system's temporary folder."""
    distributed: Annotated[str | None, alias("--distributed")] = None
    """Several processes: host:port,count,index, the address of process 0, how many there are, which this is; or auto,
    where SLURM, Open MPI or a TPU pod says so. off: none, whatever a launcher says. All are given the same flags."""
    allow_changed: Annotated[tuple[Changeable, ...], alias("--allow-changed")] = ()
    """What a run may go on with though it is not what it was begun with, of data, tokenizer and code."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}, expected 0 <= ema < 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")


class BatchIterator(Protocol):
    """Batches without end, and where they are: what grain's iterators are."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any], /) -> None: ...


class Loss(NamedTuple):
    """Sums over a batch, so that batches of unequal weight add up: the loss is total / weight."""

    total: jax.Array
    """Summed loss, in nats."""
    weight: jax.Array
    """What it is a sum over: tokens, or examples."""
    auxiliary: jax.Array | None = None
    """What training adds to total / weight, such as the balance of a mixture of experts. Evaluations leave it out."""


def with_auxiliary(loss: Loss, model: Any, auxiliary: jax.Array) -> Loss:
    """A loss with what the model's `run` says that training adds to it, where the model has something to add."""
    adds = model if hasattr(model, "has_auxiliary_loss") else zoo.backbone_of(model)
    return loss._replace(auxiliary=auxiliary) if adds.has_auxiliary_loss else loss


LossFunction = Callable[[Any, Batch, nnx.Rngs | None], Loss]
CarriedLoss = Callable[[Any, Batch, nnx.Rngs | None, Any], tuple[Loss, Any]]
"""A loss that goes on from what the step before left, and leaves something for the next."""


class Task(NamedTuple):
    """What an experiment is to the loop."""

    init: Callable[[nnx.Rngs], nnx.Module]
    """Makes the model."""
    loss: LossFunction
    """Loss of a model on a batch; rngs is None outside training."""
    batches: BatchIterator
    """Training batches; every array's first axis is batch_size."""
    evaluate: Callable[[nnx.Module], dict[str, float]]
    """Held-out metrics; "loss" chooses the best checkpoint."""
    describe: Callable[[float], dict[str, float]] = lambda loss: {}
    """More metrics from a training loss, such as perplexity."""
    tokens_per_batch: int = 0
    """Tokens, or other units, that a step sees: for the speed that is shown."""
    carried_loss: CarriedLoss | None = None
    """The loss of a task whose batches go on from one another; its last argument is `init_carry`'s at first."""
    init_carry: Callable[[Any, int], Any] | None = None
    """What the first step goes on from, given the model and batch_size: arrays whose first axis is batch_size."""
    flops_per_token: float = 0.0
    """Floating-point operations that a token needs forward and backward, for MFU. 0: not known."""
    unit: str = "tokens"
    """What tokens_per_batch counts."""
    read: Callable[[Any], Any] = lambda model: model
    """What the model of the trained parameters is used as: evaluated, and what the run gives."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, as arrays: what a checkpoint holds."""

    step: jax.Array
    """Steps done."""
    params: dict[str, Any]
    """The model's `nnx.Param`s as nested dicts, in param_dtype (the masters), with or without stacks of layers."""
    opt_state: Any
    """The optimiser's state."""
    key: jax.Array
    """Typed key; each step folds its number in."""
    carry: Any = None
    """What a step leaves for the next, one row of each array for each row of the batch. None: nothing."""
    average: Any = None
    """Running mean of the parameters, like `params`. None: not kept."""


class Finished(NamedTuple):
    """How a run ended."""

    state: TrainState
    model: Any
    """The model of the last state, with the running mean of the parameters where there is one; see `Task.read`."""
    stopped: bool
    """Whether a signal ended it, be it after its last step: the command does nothing more, the same one resumes."""


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], Any]:
    """Splits a model into its graph, its parameters as nested dicts, and other variables (constants)."""
    graphdef, *parts = nnx.split(model, nnx.Param, ...)
    params, rest = parts
    return graphdef, nnx.to_pure_dict(params), rest


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, key: jax.Array, *, average: bool = False
) -> TrainState:
    """What the first step of a training starts from, with the layers stacked that the model runs in loops.

    Args:
      model: its parameters are the state's, not copies, but for those stacked; the step gives their memory away.
      optimizer: from `make_optimizer`.
      key: of dropout.
      average: whether to keep a running mean of the parameters.
    """
    params = zoo.stack_layers(split_model(model)[1], model)
    mean = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), key, average=mean)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A jitted training step, step(state, batch) -> (state, metrics)."""

    program: Any
    """What is jitted, of (state, rest, batch): it can be lowered for shapes and devices that are not here."""
    rest: Any
    """The model's variables that are no parameters."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step. The state is donated: use the returned one."""
        return self.program(state, self.rest, batch)

    def compile(self, state: TrainState, batch: Batch) -> None:
        """Compiles the step, which the first call then does not."""
        self.program.lower(state, self.rest, batch).compile()


def place_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    *,
    average: bool = False,
) -> TrainState:
    """`init_state` of a model whose variables are on the mesh, each device with its part; see `loop.sharding`."""
    graphdef, variables = nnx.split(model)

    def init(variables, key):
        return init_state(nnx.merge(graphdef, variables), optimizer, key, average=average)

    if not is_cut(mesh):
        return jax.device_put(init(variables, key), everywhere(mesh))
    shardings = shardings_of_state(jax.eval_shape(init, variables, key), model, mesh)
    return jax.jit(init, out_shardings=shardings)(variables, key)


def make_train_step(
    model: nnx.Module,
    loss: LossFunction | CarriedLoss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    carried: bool = False,
    ema: float = 0.0,
) -> TrainStep:
    """Builds the jitted training step. Its state argument is donated: use the returned one.

    Args:
      model: its structure is taken, and its variables that are no parameters; its parameters are those in the state. It
        may be one of shapes, `zoo.models.build.abstract`, where the step is to be lowered only.
      loss: loss of a model on a batch, as sums.
      optimizer: from `make_optimizer`, or any optax transformation of nested dicts.
      accumulate: micro-batches that the batch is cut into. Gradients add up as sums, so any number gives the same, but
        for auxiliary losses, which are averaged over micro-batches by weight.
      carried: whether the loss takes and returns the state's `carry`. No gradient flows back into it.
      ema: decay of the state's `average`, where it has one: (1 + step) / (10 + step) as long as that is less.

    Returns:
      step(state, batch) -> (state, {"loss", "grad_norm", "param_norm", "skipped"}), and "auxiliary_loss" where the loss
      has one. A batch of no weight, of padding alone, say, is skipped: its loss is 0 and the parameters, their mean and
      the schedule stay as they are; the optimiser's running means see a gradient of 0.
    """
    graphdef, _, rest = split_model(model)
    described = nnx.eval_shape(lambda: model)  # the metadata of its parameters, without them

    def kept_cut(tree, specs_of):
        """A state or gradients, on the devices that have them from one step to the next."""
        mesh = jax.sharding.get_abstract_mesh()
        one = mesh.empty or mesh.size == 1
        return tree if one else jax.lax.with_sharding_constraint(tree, specs_of(tree, described, mesh))

    def micro_loss(params, rest, batch, key, carry):
        model = zoo.gather_outside_layers(nnx.merge(graphdef, zoo.unstack_layers(params), rest))
        rngs = nnx.Rngs(dropout=key)
        out, carry = loss(model, batch, rngs, carry) if carried else (loss(model, batch, rngs), carry)
        if out.auxiliary is None:
            return out.total, (out, carry)
        out = out._replace(auxiliary=out.auxiliary * out.weight)
        return out.total + out.auxiliary, (out, carry)

    gradients_of = jax.grad(micro_loss, has_aux=True)

    def sums_of(params, rest, inputs):
        gradients, (sums, carry) = gradients_of(params, rest, *inputs)
        return (sums, kept_cut(gradients, specs_of_params)), carry

    # Row m * accumulate + a goes to micro-batch a, so that each keeps its share of rows on every device.
    def cut(tree):
        return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), tree)

    def join(tree):
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)

    # Variables that are not trained are an argument: inside the program, a frozen model's would be copied into it.
    def step(state: TrainState, rest: Any, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            (sums, gradients), carry = sums_of(state.params, rest, (batch, key, state.carry))
        else:
            inputs = (cut(batch), jax.random.split(key, accumulate), cut(state.carry))
            shapes, _ = jax.eval_shape(sums_of, state.params, rest, jax.tree.map(lambda x: x[0], inputs))

            def add(sums, inputs):
                more, carry = sums_of(state.params, rest, inputs)
                return jax.tree.map(jnp.add, sums, more), carry

            sums, gradients = jax.tree.map(jnp.zeros_like, shapes)
            zeros = (sums, kept_cut(gradients, specs_of_params))
            (sums, gradients), carry = jax.lax.scan(add, zeros, inputs)
            carry = join(carry)
        empty = sums.weight == 0
        weight = jnp.where(empty, 1, sums.weight)

        def unless_empty(new, old):
            return jax.tree.map(lambda new, old: jnp.where(empty, old, new), new, old)

        gradients = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = unless_empty(optax.apply_updates(state.params, updates), state.params)
        # The counts of steps alone: to choose among the moments too would cost their memory once more.
        opt_state = jax.tree.map(
            lambda new, old: new if jnp.ndim(new) else unless_empty(new, old), opt_state, state.opt_state
        )
        metrics = {
            "loss": sums.total / weight,
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(state.params),
            "skipped": empty,
        }
        if sums.auxiliary is not None:
            metrics["auxiliary_loss"] = sums.auxiliary / weight
        average = state.average
        if average is not None:
            decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
            average = unless_empty(optax.incremental_update(params, average, 1 - decay), average)
        after = TrainState(state.step + 1, params, opt_state, state.key, carry, average)
        return kept_cut(after, specs_of_state), metrics

    return TrainStep(jax.jit(step, donate_argnums=0), rest)


def mean_loss(model: nnx.Module, loss: LossFunction, batches: Iterable[Batch]) -> float:
    """The loss over all batches together, without dropout, in nats a token (or example); nan where there is none."""
    sums = sum_over(model, loss, batches)
    return mean_of(sums.total, sums.weight)


def mean_of(total: float, weight: float) -> float:
    """total / weight, and nan of nothing."""
    return total / weight if weight else math.nan


def sum_over(model: nnx.Module, function: Callable[[Any, Batch, None], Any], batches: Iterable[Batch]) -> Any:
    """What `function(model, batch, None)` gives, a tuple or a dict of sums, added up over all batches: floats.

    Equal functions are compiled once: give the same object, not a new lambda, at each evaluation.
    """
    graphdef, variables = nnx.split(model)
    mesh = current_mesh()
    variables = placed(variables, mesh)
    with jax.set_mesh(mesh):
        sums = [_applied(graphdef, variables, spread(batch, mesh), function) for batch in batches]
    return jax.tree.map(lambda *values: sum(map(float, values)), *jax.device_get(sums))


_applied = jax.jit(
    lambda graphdef, variables, batch, function: function(
        zoo.gather_outside_layers(nnx.merge(graphdef, variables)), batch, None
    ),
    static_argnums=(0, 3),
)


def train(task: Task, config: TrainConfig, optim: OptimConfig, folder: Path, *, record: dict | None = None) -> Finished:
    """Trains from the newest sound checkpoint in `folder`, or from the start, on the mesh that is set (`on_mesh`).

    Args:
      task: model, loss and data.
      config: how long, how often, what to keep.
      optim: the optimiser.
      folder: where checkpoints, metrics.jsonl, TensorBoard files and curves.png go. What is deleted there is written
        again at the next save, but for older checkpoints; where it cannot be written any more, the run goes on
        elsewhere, see `rescue`.
      record: the whole configuration, for the loggers.

    Returns:
      The last state and its model. SIGINT and SIGTERM end the run after the step at hand, saved; the command then exits
      with 130 or 143, see `stopping`.

    Raises:
      FloatingPointError: the loss or the gradient stopped being finite: names the step and the last good checkpoint;
        newer ones, which had diverged already, are set aside.
      UsageError: another process trains in the folder, or the disk has no room for one checkpoint; or the run has
        been trained to its end elsewhere, for the folder could not be written any more: says where it is.
      OSError: it could be written nowhere.
    """
    mesh = current_mesh()
    check_rows(mesh, config.batch_size, config.accumulate)
    if config.carry_state and (task.carried_loss is None or task.init_carry is None):
        raise UsageError("carry_state=True, but this experiment's batches do not go on from one another")
    with run_lock(folder), jax.set_mesh(mesh), jax.default_matmul_precision(config.matmul_precision):
        return _train(task, config, optim, folder, mesh, record or {})


def _train(
    task: Task, config: TrainConfig, optim: OptimConfig, folder: Path, mesh: jax.sharding.Mesh, record: dict
) -> Finished:
    graphdef, params, rest = make_model(lambda: task.init(nnx.Rngs(params=jax.random.key(config.seed))), mesh)
    model = nnx.merge(graphdef, params, rest)
    optimizer = make_optimizer(optim, config.steps, model)
    schedule = make_schedule(optim, config.steps)
    state = place_state(model, optimizer, jax.random.key(config.seed), mesh, average=config.ema > 0)
    loss: LossFunction | CarriedLoss = task.loss
    if config.carry_state and task.carried_loss is not None and task.init_carry is not None:
        loss, carry = task.carried_loss, task.init_carry(model, config.batch_size)
        state = dataclasses.replace(state, carry=jax.device_put(carry, by_rows(mesh)))
    step_function = make_train_step(
        model, loss, optimizer, accumulate=config.accumulate, carried=config.carry_state, ema=config.ema
    )
    del model, params  # those layers that the state has stacked
    peak = peak_flops(jax.devices()[0])

    def current_model():
        params = state.params if state.average is None else state.average
        return task.read(nnx.merge(graphdef, zoo.unstack_layers(params), rest))

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    like_by_layer = zoo.unstack_layers(wanted(like), split=HostArray.layers)

    def restored_state(saved: TrainState) -> TrainState:
        return to_devices(zoo.stack_like(saved, like, join=Stack), like)

    lines: list[str] = []
    with (
        RunFiles(
            folder,
            keep_last=config.keep_last,
            rescue=config.rescue,
            print_line=lambda line: progress.print(line),
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=record,
        ) as files,
        stop_signals() as stop,
    ):
        first, before = 0, None
        with usage_errors():  # a checkpoint of another model
            restored = files.checkpoints.restore_latest(like_by_layer)
        if restored:
            first = restored.step
            if first < config.steps:  # two of them may not fit, and the first step would give its memory away
                jax.tree.map(lambda x: x.delete(), state)
            state = restored_state(restored.state)
            task.batches.set_state(restored.data_state)
            before = learning_rate_of(restored, read_metrics(folder))
            del restored
        aside = set_metrics_aside(folder) if not first and distributed.is_first() else None
        files.metrics.rewind(first)
        if first < config.steps:
            record_start(folder, first)
        files.begin(bytes_of(state), first or None)

        with Progress(config.steps, start=first, silent=not distributed.is_first()) as progress:
            if first:
                lines.append(f"resumed from step {first} in {folder}{said_of_length(first, config.steps)}")
            if first < config.steps:
                lines += [said_of_warmup(optim, config.steps), said_of_rate(optim, config.steps, before)]
            if aside:
                lines.append(
                    f"no checkpoint in {folder}: it begins again; the metrics until now are kept in {aside.name}"
                )
            if first < config.steps:
                with usage_errors():
                    size, count = bytes_of(state), config.keep_last + 1
                    lines.append(distributed.agreed(lambda: said_of_space(folder, size, count)))
                lines.append("compiling the training step")
            for line in filter(None, lines):
                progress.print(line)
            clock, clock_step = time.perf_counter(), first
            pending, went_well, skipped = None, None, 0
            agreed_stop = AgreedStop(stop, mesh)

            def look_back(batch):
                """Which checkpoint is good, for the last step was not; its state is given up."""
                with contextlib.suppress(OSError):
                    files.checkpoints.finish()
                jax.tree.map(lambda x: x.delete(), state)  # two of them may not fit

                def first_loss():
                    losses = [r["loss"] for r in read_metrics(files.folder) if r["split"] == "train" and "loss" in r]
                    return next(filter(np.isfinite, losses), None)

                def try_step(saved):
                    _, values = step_function(restored_state(saved), spread(batch, mesh))
                    return float(values["loss"]) if np.isfinite(float(values["grad_norm"])) else np.nan

                began_with = distributed.agreed(first_loss)
                return step_back(
                    files.checkpoints, like_by_layer, try_step, np.inf if began_with is None else began_with
                )

            def check(step, values, batch):
                """Waits for a step's metrics, and stops the run where they are not finite."""
                nonlocal went_well, skipped
                values = {name: float(value) for name, value in values.items()}
                for name in ("loss", "grad_norm"):
                    if not np.isfinite(values[name]):
                        found = look_back(batch if went_well is None else went_well)
                        raise FloatingPointError(f"{name} is {values[name]} at step {step} in {files.folder}; {found}")
                if values.pop("skipped"):
                    if not skipped:
                        progress.print(f"step {step} has nothing to learn from and is skipped; others will be counted")
                    skipped += 1
                    return {}
                went_well = batch
                return values

            def report(step, values, batch):
                """Writes the log line of a step, at its times."""
                nonlocal clock, clock_step
                values = check(step, values, batch)
                progress.update(step, loss=values.get("loss"))
                if step % config.log_every and step != config.steps:
                    return
                n_timed = step - clock_step  # none where this is the step that was compiled
                speed = n_timed and n_timed * task.tokens_per_batch / (time.perf_counter() - clock)
                clock, clock_step = time.perf_counter(), step
                values |= task.describe(values["loss"]) if values else {}
                values["learning_rate"] = float(schedule(step - 1))
                if speed:
                    values[f"{task.unit}_per_second"] = speed
                if speed and peak and task.flops_per_token:
                    values["mfu"] = speed * task.flops_per_token / (peak * mesh.size)
                files.write(step, values, "train")
                left = {"seconds_left": (config.steps - step) * task.tokens_per_batch / speed} if speed else {}
                progress.print(format_line(step, config.steps, values | left))
                if not n_timed:  # what the first record costs, such as opening TensorBoard, comes once too
                    clock = time.perf_counter()

            for step in range(first + 1, config.steps + 1):
                batch = next(task.batches)
                if step == first + 1 and distributed.count() > 1:
                    step_function.compile(state, spread(batch, mesh))
                    distributed.meet()
                state, values = step_function(state, spread(batch, mesh))
                stops, failed = agreed_stop.after_step(files.failed)
                if step == first + 1:  # nearly all of its time is the compiler's, which says nothing of the others
                    jax.block_until_ready(values)
                    clock, clock_step = time.perf_counter(), step
                    progress.restart_clock()
                if pending:
                    report(*pending)  # one step late, so that the device never waits for the log
                pending = (step, values, batch)
                last = step == config.steps or stops
                evaluates = step % config.eval_every == 0 or step == config.steps
                if not (last or evaluates or failed or files.unsaved or step % config.save_every == 0):
                    continue
                report(*pending)
                pending, held_out, pause = None, None, time.perf_counter()
                if evaluates:
                    held_out = task.evaluate(current_model())
                    files.write(step, held_out, "validation")
                    progress.print("held out: " + format_line(step, config.steps, held_out))
                files.save(
                    step,
                    zoo.unstack_layers(to_host(state), split=HostArray.layers),
                    data_state=task.batches.get_state(),
                    metrics={"learning_rate": float(schedule(step - 1))} | (held_out or {}),
                    last=last,
                )
                clock += time.perf_counter() - pause  # the speed shown is that of training alone
                if last:
                    break
            if skipped:
                progress.print(f"{skipped} of {step - first} steps had nothing to learn from and were skipped")
            stopped = agreed_stop.settle()
    folder = files.folder
    try:
        if distributed.is_first():
            plot_metrics(folder)
            write_page(folder)
    except OSError as error:
        print(f"{folder}: the curves could not be drawn: {said(error)}", flush=True)

    def moved() -> None:
        raise UsageError(f"trained to step {state.step} of {config.steps}, but {files.rescued}")

    if files.rescued.moved:
        distributed.agreed(moved)  # the first process says it, after which the others end
    finished = Finished(state, current_model(), stopped=stopped)
    if finished.stopped:
        print(
            f"stopped at step {state.step} of {config.steps}, saved in {folder}; the same command resumes", flush=True
        )
    return finished
