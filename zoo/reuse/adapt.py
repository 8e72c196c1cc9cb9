"""Low-rank adapters: a model is tuned by a small change of its linear maps, and all else of it stays as it is.

    model = zoo.add_lora(model, rank=8, targets="in_proj|out_proj", rngs=nnx.Rngs(0))     train it as any other
    model = zoo.merge_lora(model)                                                          an ordinary model again

An adapter stands in the place of a weight and is read like one, so every map has one in the same way: projections of
attention and state spaces, those whose kernel a mixer reads itself, the blocks of Monarch matrices, experts. A step
computes the changed weight, rank / positions of the cost of the map itself. Adapters lie upon adapters, and upon
quantised weights.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1 (LoRA); Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11 (DoRA).

Axes: i input, o output, r rank.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from zoo.layers.rngs import Seed, as_rngs
from zoo.models.frozen import copied, freeze, thaw
from zoo.reuse.linear_maps import Axes, ComputedWeight, LinearMap, Model, linear_maps, named
from zoo.reuse.quantize import KINDS


class LoRAWeight(ComputedWeight):
    """A frozen weight W and a trained change of low rank.

        W' = W + scale A B                                           LoRA
        W' = magnitude (W + scale A B) / |W + scale A B|             DoRA; the norm is over inputs, one an output

    B starts at zero, and the magnitude at |W|: at first W' is W. DoRA's gradient takes the norm as a constant.
    """

    undone_by = "zoo.merge_lora"

    def __init__(self, linear: LinearMap, *, rank: int, alpha: float, dora: bool, rngs: nnx.Rngs):
        """
        Args:
          linear: whose weight is adapted; with an adapter or quantised already, that stays as it is.
          rank: r.
          alpha: `scale` times the rank.
          dora: whether the magnitude of each output's weights is trained on its own.
          rngs: stream "params".
        """
        self.base, self.axes = linear.weight, tuple(linear.axes)
        self.rank, self.alpha = rank, alpha
        shape = linear.weight.shape
        along = _metadata(linear.weight).get("axes", (None,) * len(shape))
        first, (d_in, d_out) = along[:-2], (along[axis] for axis in linear.axes)
        blocks, dtype = shape[:-2], jnp.promote_types(linear.weight.dtype, jnp.float32)
        bound = shape[linear.axes.d_in] ** -0.5
        self.lora_A = nnx.Param(
            jax.random.uniform(rngs.params(), (*blocks, shape[linear.axes.d_in], rank), dtype, -bound, bound),
            axes=(*first, d_in, None),
        )
        self.lora_B = nnx.Param(jnp.zeros((*blocks, rank, shape[linear.axes.d_out]), dtype), axes=(*first, None, d_out))
        norm = _norm(self._changed(), self.axes) if dora else None
        self.magnitude = None if norm is None else nnx.Param(norm, decay=False, axes=(*first, d_out))

    def whole(self) -> Array:
        changed = self._changed()
        if self.magnitude is not None:
            norm = lax.stop_gradient(_norm(changed, self.axes))
            ratio = self.magnitude[...] / jnp.where(norm == 0, 1, norm)
            changed = changed * jnp.expand_dims(ratio, self.axes[0])
        return changed.astype(self.base.dtype)

    def _changed(self):
        base, A, B = self.base[...], self.lora_A[...], self.lora_B[...]
        change = self.alpha / self.rank * jnp.matmul(A, B, precision=lax.Precision.HIGHEST)  # i o
        return base.astype(change.dtype) + (change if self.axes == Axes(-2, -1) else jnp.swapaxes(change, -1, -2))


def _norm(weight, axes):
    """The norm of each output's weights."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=axes[0]))


def add_lora(
    model: Model,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | None = None,
    dora: bool = False,
    trained: str | None = None,
    rngs: Seed,
) -> Model:
    """A model that computes the same as the one given, and trains adapters of its linear maps alone.

    Everything else is frozen, that is no `nnx.Param`: it has no gradient and no optimiser state. Its arrays are the
    given model's, which stays as it is.

    Args:
      model: any module with linear maps.
      rank: r, from 1 up. An adapter has r (d_in + d_out) parameters, one in each block or expert.
      alpha: factor on the change, times r. None: r, a factor of 1.
      targets: which maps, a regular expression, see `linear_maps`. None: all of the blocks.
      dora: whether the magnitudes are trained, too.
      trained: names of parameters that are trained as they are, a regular expression on the end of their names, such
        as "classifier" or "classifier.bias"; they have no adapter. None: none.
      rngs: stream "params", or a seed.

    Raises:
      ValueError: rank below 1, alpha of 0 or less; nothing that `targets` or `trained` names.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> adapted = zoo.add_lora(model, rank=4, targets="in_proj|out_proj", rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(adapted(jnp.ones((1, 3), jnp.int32)), model(jnp.ones((1, 3), jnp.int32)), atol=1e-5))
      True
    """
    if rank < 1:
        raise ValueError(f"rank={rank}, expected at least 1")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}, expected more than 0")
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    kept = set() if trained is None else set(named("trained", trained, names))
    model, rngs = freeze(model, lambda name: name in kept), as_rngs(rngs)
    maps = {name: linear for name, linear in linear_maps(model, targets).items() if name not in kept}
    if not maps:
        raise ValueError(f"targets={targets!r}, expected maps besides those that trained={trained!r} names")
    for linear in maps.values():
        linear.replace(LoRAWeight(linear, rank=rank, alpha=alpha or float(rank), dora=dora, rngs=rngs))
    return model


def merge_lora(model: Model) -> Model:
    """An ordinary model that computes what one with adapters does: every weight is one array, all can be trained.

    Args:
      model: from `add_lora`, trained. It stays as it is. Weights that are quantised below an adapter become arrays.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> plain = zoo.merge_lora(zoo.add_lora(model, rank=4, rngs=nnx.Rngs(0)))
      >>> jax.tree.structure(nnx.state(plain)) == jax.tree.structure(nnx.state(model))
      True
    """
    model = copied(model)
    for linear in linear_maps(model, ".*").values():
        if isinstance(linear.weight, LoRAWeight):
            linear.replace(nnx.Param(linear.weight[...], **_metadata(linear.weight)))
    return thaw(model)


def _metadata(weight):
    """What the parameter said of itself that an adapter lies upon, or nothing."""
    while isinstance(weight, LoRAWeight):
        weight = weight.base
    return dict(weight.metadata) if isinstance(weight, KINDS) else weight.get_metadata()
