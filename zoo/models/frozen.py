"""Parameters that a training leaves as they are: no gradient, no optimiser state, no weight decay, no checkpoint.

The loop trains what is an `nnx.Param` and passes everything else along. So freezing is to make another kind of variable
of a parameter, and what is frozen stays the same bit for bit, whatever the optimiser does.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


def freeze(model: Model, trained: Callable[[str], bool] = lambda name: False) -> Model:
    """A model of the same arrays in which only some parameters are trained.

    Args:
      model: any module. It stays as it is.
      trained: whether a parameter is, by its name, such as "backbone.layers.0.mixer.dt_bias". These are copied, since
        a training step gives the memory of its parameters away.
    """
    return _with_kinds(model, lambda name: nnx.Param if trained(name) else Frozen, copy_trained=True)


def copied(model: Model) -> Model:
    """A model with modules and variables of its own, of the same arrays: what is written into the one stays out of the
    other."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))  # merged as they are, variables would be shared


def thaw(model: Model) -> Model:
    """A model of the same arrays in which every parameter can be trained."""
    return _with_kinds(model, lambda name: nnx.Param)


def _with_kinds(model: Model, kind_of: Callable[[str], type[nnx.Variable]], *, copy_trained: bool = False) -> Model:
    model = copied(model)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, Frozen))):
        kind = kind_of(".".join(map(str, path)))
        owner = functools.reduce(_child, path[:-1], model)
        value = variable.get_value()
        if copy_trained and kind is nnx.Param:
            value = jnp.array(value)
        setattr(owner, str(path[-1]), kind(value, **variable.get_metadata()))
    return model


def _child(owner: Any, name: Any) -> Any:
    return owner[name] if isinstance(name, int) else getattr(owner, name)
