"""Training in stages: which part of a vision-language model learns, and the others stay as they are to the bit."""

import functools
from typing import Any, Literal, TypeVar

import jax
from flax import nnx

Trained = Literal["connector", "language", "all"]
Model = TypeVar("Model", bound=nnx.Module)
# The parts that learn in each stage.
_PARTS: dict[str, tuple[str, ...]] = {
    "connector": ("connector",),
    "language": ("connector", "language"),
    "all": ("vision", "connector", "language"),
}


def hold(model: Model, trained: Trained) -> Model:
    """Marks what does not learn: its updates are multiplied by 0 (`make_optimizer`)."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] not in _PARTS[trained]:
            owner = functools.reduce(_child, path[:-1], model)
            value, metadata = variable.get_value(), variable.get_metadata()
            setattr(owner, str(path[-1]), nnx.Param(value, **metadata | {"lr_scale": 0.0, "decay": False}))
    return model


def _child(owner: Any, name: Any) -> Any:
    return owner[name] if isinstance(name, int) else getattr(owner, name)


def without_gradients(model: Model, trained: Trained) -> Model:
    """The same in value; nothing is computed on the way back for what does not learn, and no norm counts it."""
    if trained == "all":
        return model
    graphdef, state = nnx.split(model)
    flat = [
        (path, variable if path[0] in _PARTS[trained] else jax.tree.map(jax.lax.stop_gradient, variable))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
