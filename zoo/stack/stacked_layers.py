"""Parameters of equal layers as one array each, so that what is computed with them does not grow with their number.

    {"layers": {0: a, 1: b, 2: c, 3: d}}  <->  {"layers": {3: d}, "stacked_layers": {"0+1+2": stack(a, b, c)}}

A model is made, loaded and saved layer by layer. With `scan_layers` it runs equal ones in a loop, over a stack of their
parameters; a training step whose state is stacked already neither copies them for that at each call, nor has an
optimiser that the compiler must spell out for each layer: its program is the same at any depth.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.stack.backbone import Backbone

Tree = TypeVar("Tree")

LAYERS, STACKED = "layers", "stacked_layers"


@jax.custom_vjp
def rows(stack: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays of a stack. Its gradient is the stack of theirs; that of indexing would be a sum of padded ones."""
    return _rows(stack)


def _rows(stack: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(stack[i] for i in range(len(stack)))


rows.defvjp(lambda stack: (_rows(stack), None), lambda _, gradients: (jnp.stack(gradients),))


def stack_layers(params: dict[str, Any], model: nnx.Module) -> dict[str, Any]:
    """Parameters with those of the layers stacked that the model's backbones run in loops (`scan_layers`).

    Args:
      params: the whole model's or part of them, in nested dicts as `nnx.to_pure_dict` gives them. Layers are left alone
        where not all of a loop have the same in it.
      model: its backbones say what is stacked.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32, scan_layers=True)
      >>> stacked = zoo.stack_layers(nnx.to_pure_dict(nnx.state(model, nnx.Param)), model)
      >>> any(leaf.ndim == 3 and leaf.shape[0] == 2 for leaf in jax.tree.leaves(stacked))  # two layers in one array
      True
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Backbone):
            params = _at(params, path, functools.partial(_stacked, groups=module.looped_layers, join=jnp.stack))
    return params


def stack_like(tree: Any, like: Tree, join: Callable[[Sequence], Any] = np.stack) -> Tree:
    """The inverse of `unstack_layers`: a tree with the layers stacked that are so in another.

    Args:
      tree: a pytree layer by layer.
      like: the same with some layers stacked, or none.
      join: makes one leaf of several.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32, scan_layers=True)
      >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
      >>> stacked = zoo.stack_layers(params, model)
      >>> jax.tree.structure(zoo.stack_like(params, stacked)) == jax.tree.structure(stacked)
      True
    """
    stack = lambda like, tree: _stacked(tree, map(_numbers, like[STACKED]), join) if _is_stacked(like) else tree  # noqa: E731
    return jax.tree.map(stack, like, tree, is_leaf=_is_stacked)


def unstack_layers(tree: Tree, split: Callable[[Any], Sequence] = rows) -> Tree:
    """What `stack_layers` stacked, layer by layer, wherever it is in a pytree; one without stacks comes back as it is.

    Args:
      tree: parameters, or an optimiser's state, or all that a training step changes.
      split: the leaves that one stands for. tuple: those of NumPy arrays, without a copy.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32, scan_layers=True)
      >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
      >>> again = zoo.unstack_layers(zoo.stack_layers(params, model))
      >>> jax.tree.structure(again) == jax.tree.structure(params)
      True
    """
    return jax.tree.map(lambda x: _unstacked(x, split) if _is_stacked(x) else x, tree, is_leaf=_is_stacked)


def _at(tree: Any, path: Sequence, change: Callable[[dict], dict]) -> Any:
    """A tree with what is at a path changed, if it is there."""
    if not path:
        return change(tree)
    if not isinstance(tree, dict) or path[0] not in tree:
        return tree
    return {**tree, path[0]: _at(tree[path[0]], path[1:], change)}


def _numbers(name: str) -> list[int]:
    """The layers that a stack is of."""
    return [int(number) for number in name.split("+")]


def _stacked(tree: dict[str, Any], groups: Iterable[Sequence[int]], join) -> dict[str, Any]:
    layers, stacks = dict(tree.get(LAYERS, {})), {}
    for group in groups:
        several = [layers.get(i) for i in group]
        if several[0] is not None and len(set(map(jax.tree.structure, several))) == 1:
            stacks["+".join(map(str, group))] = jax.tree.map(lambda *leaves: join(leaves), *several)
            for i in group:
                del layers[i]
    if not stacks:
        return tree
    return {**tree, LAYERS: layers, STACKED: stacks}


def _is_stacked(tree: Any) -> bool:
    return isinstance(tree, dict) and STACKED in tree


def _unstacked(tree: dict[str, Any], split) -> dict[str, Any]:
    layers = dict(tree[LAYERS])
    for name, stack in tree[STACKED].items():
        leaves, structure = jax.tree.flatten(stack)
        each = zip(*map(split, leaves), strict=True)
        layers |= {i: jax.tree.unflatten(structure, one) for i, one in zip(_numbers(name), each, strict=True)}
    return {key: value for key, value in tree.items() if key != STACKED} | {LAYERS: dict(sorted(layers.items()))}
