"""Which units a training finds not to be needed: each has a gate that is drawn anew at every step, and pays to be sure.

    gated = zoo.add_gates(model, d_ff=64, n_heads=4)                  all that goes by these widths has gates; train it
    small = zoo.prune(model, batches, d_ff=64, n_heads=4, importance=zoo.gate_scores(gated))

A gate z ~ N(mu, sigma^2) stands before each map that reads a unit, a hidden channel or a head, and multiplies it: 1 at
first, and mu where nothing is drawn. The divergence from the most noise that a unit can bear is added to the loss,

    KL = 1/2 log(1 + mu^2 / sigma^2)        summed over gates,

so that a unit on which the loss does not depend gets a mean of nothing or noise without end. Those of the smallest KL,
which is small where mu^2 / sigma^2 is, are needed least. The model's own parameters are frozen, or trained along.

Source: Dutta et al. 2024, arXiv:2406.05276 (VTrans; with frozen weights its Faster-VTrans); Dai et al. 2018,
arXiv:1802.10399 (the divergence). One draw a step here, the same for all rows.

Axes: n units, i inputs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from zoo.models.adjust import run_layer_by_layer
from zoo.models.build import Model
from zoo.models.distill import backbone_of
from zoo.models.frozen import copied, freeze, thaw
from zoo.reuse.choose_units import Wanted, prunable_widths, targets
from zoo.reuse.grow import require_language
from zoo.reuse.linear_maps import ComputedWeight, linear_maps
from zoo.reuse.widths import RESIDUAL, Axis, sizes

_SIGMA = 0.1
"""Standard deviation of gates at first."""


class Draw(nnx.Variable):
    """What of a standard normal distribution has been drawn for each gate of a width: zeros but in training."""


class Gates(nnx.Module):
    """The gates of a width's units, before one map."""

    def __init__(self, width: str, n_units: int):
        self.width = width
        self.mean = nnx.Param(jnp.ones((n_units,)), decay=False, axes=(None,))
        self.log_variance = nnx.Param(jnp.full((n_units,), 2 * np.log(_SIGMA), jnp.float32), decay=False, axes=(None,))
        self.draw = Draw(jnp.zeros((n_units,)))

    def __call__(self) -> Float[Array, "n"]:
        """z, as it was drawn."""
        return self.mean[...] + jnp.exp(self.log_variance[...] / 2) * self.draw[...]


class GatedWeight(ComputedWeight):
    """A weight whose inputs are multiplied by the gates of the units that they are."""

    undone_by = "zoo.without_gates"

    def __init__(self, base: Any, gates: Gates, number: int, axis: Axis):
        """
        Args:
          base: the weight.
          gates: of the width.
          number: which axis of the weight reads it.
          axis: what that is.
        """
        self.base, self.gates, self.number = base, gates, number
        self.spans = tuple((s.units, s.each, s.width == gates.width) for s in axis.spans)
        self.in_blocks = axis.spans[0].rows is not None

    def whole(self) -> Array:
        weight, z = self.base[...], self.gates()
        shape = [1] * weight.ndim
        if self.in_blocks:  # a run of units in each
            shape[0], shape[self.number] = weight.shape[0], weight.shape[self.number]
        else:
            parts = [jnp.repeat(z, each) if ours else jnp.ones(units * each) for units, each, ours in self.spans]
            z, shape[self.number] = jnp.concatenate(parts), weight.shape[self.number]
        return (weight * z.reshape(shape)).astype(weight.dtype)


def add_gates(
    model: Model, *, d_ff: int | None = None, n_heads: int | Mapping[str, int] | None = None, frozen: bool = True
) -> Model:
    """A model that computes the same as the one given, and has gates on the units of widths that are to shrink.

    Args:
      model: as for `zoo.prune`. It stays as it is.
      d_ff, n_heads: which widths, as for `zoo.prune`; how many units shall stay does not matter yet.
      frozen: whether all but gates is frozen, no `nnx.Param`.

    Raises:
      ValueError: neither, or what `zoo.prune` refuses.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="mamba/mlp")
      >>> gated = zoo.add_gates(zoo.CausalLM(config, rngs=0), d_ff=8)
      >>> sorted(zoo.gate_scores(gated))
      ['backbone.layers.0.mlp.d_ff', 'backbone.layers.1.mlp.d_ff']
    """
    if d_ff is None and n_heads is None:
        raise ValueError("expected d_ff or n_heads: which widths have gates")
    require_language(model)
    axes, wanted = prunable_widths(model), targets(model, Wanted(None, d_ff, n_heads))
    model = freeze(model) if frozen else copied(model)
    run_layer_by_layer(model)  # layers have their own
    maps, units = linear_maps(model, ".*"), sizes(axes)
    for width in wanted:
        for path, found in axes.items():
            name = ".".join(map(str, path))
            for number, axis in enumerate(found):
                if width != RESIDUAL and name in maps and axis.read and width in [span.width for span in axis.spans]:
                    gates = Gates(width, units[width])
                    maps[name].replace(GatedWeight(maps[name].weight, gates, number, axis))
    return model


def without_gates(model: Model) -> Model:
    """An ordinary model that computes what one with gates does where nothing is drawn; all of it can be trained.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba/mlp")
      >>> gated = zoo.add_gates(zoo.CausalLM(config, rngs=0), d_ff=8)
      >>> type(zoo.without_gates(gated).backbone.layers[0].mlp.down_proj.kernel).__name__
      'Param'
    """
    model = copied(model)
    for linear in linear_maps(model, ".*").values():
        if isinstance(linear.weight, GatedWeight):
            linear.replace(nnx.Param(linear.weight[...], **linear.weight.base.get_metadata()))
    config: Any = model.config
    backbone_of(model).config = config  # with layers in a loop again, where they were
    return thaw(model)


def draw_gates(model: nnx.Module, key: Array) -> None:
    """Draws all gates anew. Where that is not called, they are their means.

    Args:
      model: from `add_gates`; it is changed.
      key: typed.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba/mlp")
      >>> gated = zoo.add_gates(zoo.CausalLM(config, rngs=0), d_ff=8)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> before = gated(ids)
      >>> zoo.draw_gates(gated, jax.random.key(0))
      >>> bool(jnp.array_equal(gated(ids), before))
      False
    """
    for i, gates in enumerate(gates_of(model)):
        # A new variable: that of a model outside a gradient's trace cannot be written inside.
        gates.draw = Draw(jax.random.normal(jax.random.fold_in(key, i), gates.draw.shape))


def gate_penalty(model: nnx.Module) -> Float[Array, ""]:
    """KL, summed over all gates, in nats.

    Examples:
      >>> options = {"pattern": "mamba/mlp", "mlp": zoo.MLPConfig(d_ff=10)}
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=1, **options)
      >>> gated = zoo.add_gates(zoo.CausalLM(config, rngs=0), d_ff=8)
      >>> round(float(zoo.gate_penalty(gated)), 2)  # ten units' gates of mean 1 and standard deviation 0.1
      23.08
    """
    each = [jnp.sum(jnp.log1p(g.mean[...] ** 2 / jnp.exp(g.log_variance[...]))) / 2 for g in gates_of(model)]
    return sum(each, start=jnp.zeros(()))


def gate_scores(model: nnx.Module) -> dict[str, Float[np.ndarray, "n"]]:
    """KL of each unit, over the maps that read it, in nats, by the name of its width: the smallest go first.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba/mlp")
      >>> gated = zoo.add_gates(zoo.CausalLM(config, rngs=0), d_ff=8)
      >>> zoo.gate_scores(gated)["backbone.layers.0.mlp.d_ff"].shape
      (48,)
    """
    scores: dict[str, np.ndarray] = {}
    for gates in gates_of(model):
        mean, variance = (np.asarray(x, np.float64) for x in (gates.mean[...], jnp.exp(gates.log_variance[...])))
        each = np.log1p(np.square(mean) / np.maximum(variance, 1e-30)) / 2
        scores[gates.width] = scores.get(gates.width, 0) + each
    return scores


def gates_of(model: nnx.Module) -> list[Gates]:
    """The gates of a model, in order."""
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Gates)]
