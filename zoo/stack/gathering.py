"""Parameters that are cut over "fsdp", gathered where they are used: a layer at a time, and once more on the way back.

The gradient of what is gathered is cut again at once, so that a whole one is never there but in one layer.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from zoo.layers.mesh_axes import FSDP, ambient_sizes, is_over, spec_of_variable, without

# Backbones keep their blocks under this name.
LAYERS = "layers"
# What a layer computes anew on the way back where its weights are gathered: what is made of weights alone, cheaply.
ANEW = frozenset(
    ("sharding_constraint", "convert_element_type", "reshape", "transpose", "squeeze", "slice", "split", "concatenate")
    + ("broadcast_in_dim", "rev", "copy", "mul", "neg", "exp")
)


def gather_outside_layers(model: Any) -> Any:
    """A model whose parameters are gathered, but for those of its layers, which gather theirs when they run.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> gathered = zoo.gather_outside_layers(model)  # before a call on a mesh
      >>> gathered.config == model.config
      True
    """
    if FSDP not in ambient_sizes():
        return model
    graphdef, variables = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map_with_path(_unless_of_a_layer, variables, is_leaf=_is_variable))


def gathered(params: Any) -> Any:
    """A layer's variables as it computes with them: parameters whole along "fsdp"."""
    return jax.tree.map(_gather, params, is_leaf=_is_variable) if FSDP in ambient_sizes() else params


def gathering(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(graphdef, params, ...)` of a layer that keeps no gathered weights for the way back."""
    if FSDP not in ambient_sizes():
        return run
    return jax.checkpoint(run, static_argnums=0, policy=lambda primitive, *_, **__: primitive.name not in ANEW)


def _unless_of_a_layer(path: tuple, variable: Any) -> Any:
    return variable if any(getattr(entry, "key", None) == LAYERS for entry in path) else _gather(variable)


def _gather(variable: Any) -> Any:
    stored = spec_of_variable(variable, ambient_sizes())
    if not is_over(stored, FSDP):
        return variable
    return variable.replace(_moved(variable[...], stored, without(stored, FSDP)))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _move(x, stored, used):
    # The first says how what is read lies, a slice of a stack, say, so that no more than that is gathered.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, stored), used)


_moved = jax.custom_vjp(_move, nondiff_argnums=(1, 2))


def _moved_backward(stored, used, _, dx):
    # Summed over rows as it is used, then cut: else what it is summed from is turned round, from rows to channels.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(dx, used), stored),)


_moved.defvjp(lambda x, stored, used: (_move(x, stored, used), None), _moved_backward)
