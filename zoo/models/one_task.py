"""The model of one task out of one of several: its router, the experts that all share."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from zoo.layers.moe import MoE
from zoo.models.build import Model, abstract


def of_task(model: Model, task: int) -> Model:
    """A model that does what the given one does in one of its tasks, and is called without a task.

    Args:
      model: with a router for each task in its mixtures of experts (`moe.n_tasks` of its config). Its other arrays are
        shared, not copied.
      task: its number, from 0.

    Raises:
      ValueError: a model of one task, a number that there is not, or one whose pattern says n_tasks.

    Examples:
      >>> moe = zoo.MoEConfig(n_experts=2, top_k=1, d_ff=8, n_tasks=2)
      >>> config = zoo.MaskedLMConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba/moe", moe=moe)
      >>> model = zoo.MaskedLM(config, rngs=0)
      >>> zoo.of_task(model, 1)(jnp.ones((1, 3), jnp.int32)).shape
      (1, 3, 32)
    """
    config: Any = model.config
    n = config.moe.n_tasks
    if not 0 <= task < n:
        raise ValueError(f"task={task}, expected 0 to {n - 1}")
    if n == 1:
        raise ValueError("the model has one router for all tasks (moe.n_tasks=1), expected one for each")
    if "n_tasks" in config.pattern:
        raise ValueError(f"pattern={config.pattern!r} says n_tasks, expected the config's moe to say it")
    one: Any = abstract(dataclasses.replace(config, moe=dataclasses.replace(config.moe, n_tasks=1)))
    routers = {(*path, "router", "kernel") for path, module in nnx.iter_modules(one) if isinstance(module, MoE)}
    flat = [
        (path, variable.replace(jnp.split(variable[...], n, axis=1)[task]) if path in routers else variable)
        for path, variable in nnx.to_flat_state(nnx.state(model))
    ]
    return nnx.merge(nnx.split(one)[0], nnx.from_flat_state(flat))
