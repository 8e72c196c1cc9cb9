"""AdamW with warm-up and decay of the learning rate, grouped by what each parameter says of itself.

A run goes on with more steps by the same command and a larger --steps. Cosine and line reach over the whole run, so
that the learning rate jumps then; "wsd" and "trapezoid" stay at their peak until they decay, and a run whose decay has
not begun goes on as if it had been the longer one from the start. Without decay a run can be extended as often as
wanted, and decays when it is told to:

    python -m experiments.causal_lm tiny --optim.schedule wsd --optim.decay-fraction 0 --steps 1000
    python -m experiments.causal_lm tiny --optim.schedule wsd --optim.decay-fraction 0.2 --steps 2000    # from 1600 on
"""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import zoo

Schedule = Literal["cosine", "linear", "trapezoid", "wsd"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
DECAYING_AT_THE_END: tuple[Schedule, ...] = ("wsd", "trapezoid")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule. The defaults are the Mamba papers' (section 9 of the recipes: AdamW, clip 1)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to the peak."""
    schedule: Schedule = "cosine"
    """How the learning rate falls from its peak. wsd (warm-up, stable, decay): not at all until the last tenth of the
    steps, and there in a line; a run that has not come there yet can be extended without a jump. trapezoid: the same,
    but by one minus a square root, as ModernBERT's."""
    decay_fraction: float = 0.1
    """Share of the steps at the end in which wsd and trapezoid decay, 0 for none; it may change from start to start of
    a run, as --steps may."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate. Parameters marked decay=False are left out."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the running mean of squares."""
    clip: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down. 0 switches clipping off."""

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction}, expected 0 to 1")
        if self.decay_fraction != OptimConfig.decay_fraction and self.schedule not in DECAYING_AT_THE_END:
            expected = " or ".join(map(repr, DECAYING_AT_THE_END))
            raise ValueError(
                f"decay_fraction={self.decay_fraction} with schedule={self.schedule!r}, expected {expected}"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}, expected more than 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}, expected at least 0")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction}, expected 0 to 1")
        if self.clip < 0:
            raise ValueError(f"clip={self.clip}, expected at least 0 (0 is off)")


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear to the peak, then as `schedule` says to its `final_fraction` at `steps`.

    A warm-up that is longer than the run is cut to all its steps but the last.
    """
    warmup, peak, last = warmup_of(config, steps), config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=steps,
            end_value=last,
        )
    after = max(1, steps - warmup)
    decay = max(1, min(after, math.floor(config.decay_fraction * steps)))
    if config.schedule == "linear":
        down = optax.linear_schedule(peak, last, after)
    elif config.decay_fraction == 0:
        down = optax.constant_schedule(peak)
    elif config.schedule == "wsd":
        down = optax.linear_schedule(peak, last, decay, transition_begin=after - decay)
    else:
        down = lambda step: peak - (peak - last) * jnp.sqrt(jnp.clip((step - after + decay) / decay, 0, 1))  # noqa: E731
    up = optax.linear_schedule(0.0, peak, max(1, warmup))
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def warmup_of(config: OptimConfig, steps: int) -> int:
    """Steps of warm-up in a run of so many."""
    return min(config.warmup_steps, steps - 1)


def make_optimizer(config: OptimConfig, steps: int, model: nnx.Module) -> optax.GradientTransformation:
    """AdamW for a model's parameters as nested dicts (`nnx.to_pure_dict`), or as `zoo.stack_layers` makes of them.

    Args:
      config: options.
      steps: length of the schedule.
      model: its parameters' metadata is read: `decay=False` exempts from weight decay, `lr_scale=0.1` slows down.
    """
    params = nnx.state(model, nnx.Param)
    decay = _metadata(params, "decay", True)
    scale = _metadata(params, "lr_scale", 1.0)
    scaled = [] if all(s == 1 for s in jax.tree.leaves(scale)) else [_scale_updates(scale)]
    return optax.chain(
        *([optax.clip_by_global_norm(config.clip)] if config.clip else []),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=functools.partial(_like, decay)),
        *scaled,
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def _metadata(params, name, default):
    values = jax.tree.map(
        lambda variable: variable.get_metadata().get(name, default),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return nnx.to_pure_dict(values)


def _scale_updates(scale):
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, _like(scale, updates)))


def _like(values, params):
    """Something of each parameter, once for each leaf of a tree like them: equal layers may be stacked there."""
    return zoo.stack_like(values, params, join=lambda several: several[0])
