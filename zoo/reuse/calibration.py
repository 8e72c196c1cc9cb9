"""What a model's linear maps read, on texts or images that are like those it will see: second moments of their inputs.

    moments = zoo.calibrate(model, batches)          {"backbone.layers.0.mixer.in_proj.kernel": (i, i), ...}

H = mean of x x^T over positions, for each map (each block; of experts over all choices, of which an expert's own count
for it: one that nobody chooses has H = 0): what a change of its weights by D costs is
tr(D^T H D), so that pruning, factorising and quantising can choose what to change, and make up for it in what is left.
The diagonal says how large each input is.

Axes: i inputs, t positions.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from m2 import BlockdiagLinear
from zoo.layers.moe import ExpertLinear
from zoo.models.adjust import run_layer_by_layer
from zoo.models.build import Model
from zoo.models.frozen import copied
from zoo.reuse.linear_maps import linear_maps, of_filter

Moments = dict[str, Float[Array, "*k i i"]]


class _Recorder:
    """Sums of the moments of one call of a model."""

    def __init__(self, mask: Array | None):
        self.mask = mask
        self.sums: dict[str, Array] = {}
        self.counts: dict[str, Array] = {}

    def add(self, name: str, rows: Array, weight: Array, *, shared_out: bool = False) -> None:
        """Rows (*k, t, i), each as often as `weight` (*k, t) says; shared out over k, rather than read by each."""
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        weighted = wide * weight[..., None]
        moment = jnp.einsum("...ti,...tj->...ij", weighted, wide, precision=lax.Precision.HIGHEST)
        self.sums[name] = self.sums.get(name, 0) + moment
        count = jnp.sum(weight, axis=-1)
        count = jnp.broadcast_to(jnp.sum(count), count.shape) if shared_out else count
        self.counts[name] = self.counts.get(name, 0) + count

    def weight_of(self, x: Array) -> Array:
        """1 for each vector (..., i) whose position is there, 0 for others."""
        if self.mask is None or x.shape[: self.mask.ndim] != self.mask.shape:
            return jnp.ones(x.shape[:-1], jnp.float32)
        mask = self.mask.reshape(self.mask.shape + (1,) * (x.ndim - 1 - self.mask.ndim))
        return jnp.broadcast_to(mask, x.shape[:-1]).astype(jnp.float32)


_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("_recorder", default=None)


class _Linear(nnx.Linear):
    """Tells the recorder what it reads, as the other two do."""

    recorded_as: str

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        if (recorder := _recorder.get()) is not None:
            weight = recorder.weight_of(inputs).ravel()
            recorder.add(self.recorded_as, inputs.reshape(-1, inputs.shape[-1]), weight)
        return super().__call__(inputs, *args, **options)


class _Blockdiag(BlockdiagLinear):
    recorded_as: str

    def __call__(self, x: Array) -> Array:
        if (recorder := _recorder.get()) is not None:
            k, _, i = self.kernel.shape
            rows = jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, k * i - x.shape[-1])))
            weight = jnp.broadcast_to(recorder.weight_of(x).ravel(), (k, len(rows)))
            recorder.add(self.recorded_as, jnp.moveaxis(rows.reshape(-1, k, i), 1, 0), weight)
        return super().__call__(x)


class _Experts(ExpertLinear):
    recorded_as: str

    def __call__(self, x: Array, group: Array | None) -> Array:
        if (recorder := _recorder.get()) is not None:
            experts = len(self.kernel)
            group_of = jnp.arange(experts) if group is None else group
            chosen = group_of == jnp.arange(experts)[:, None]  # k c
            # Places of a block that no token took are zeros.
            weight = chosen[:, :, None] * jnp.any(x != 0, axis=-1).astype(jnp.float32)
            rows = jnp.broadcast_to(x.reshape(1, -1, x.shape[-1]), (experts, x.shape[0] * x.shape[1], x.shape[-1]))
            recorder.add(self.recorded_as, rows, weight.reshape(experts, -1), shared_out=True)
        return super().__call__(x, group)


_RECORDING: dict[Any, Any] = {nnx.Linear: _Linear, BlockdiagLinear: _Blockdiag, ExpertLinear: _Experts}


def calibrate(model: Model, batches: Iterable[Mapping[str, Array]]) -> Moments:
    """Second moments of what each linear map reads.

    Args:
      model: any of the zoo's. It stays as it is.
      batches: arguments of the model by name, {"ids": ..., "mask": ...} or {"images": ...}; all of one shape are
        compiled once. Positions that the mask says are not there count for nothing.

    Returns:
      (i, i) for each map that is called, by the name of its weight; (k, i, i) for blocks and experts. Not among them
      are those whose kernel a mixer multiplies itself (Mamba's dt_proj), Monarch maps, and networks that make filters.

    Raises:
      ValueError: no batches.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> moments = zoo.calibrate(model, [{"ids": jnp.ones((2, 5), jnp.int32)}])
      >>> moments["backbone.layers.0.mixer.in_proj.kernel"].shape
      (16, 16)
    """
    graphdef, state = nnx.split(_recording(model))

    @jax.jit
    def sums(state: Any, batch: Mapping[str, Array]) -> Any:
        with _recorded(batch.get("mask")) as recorder:
            model: Any = nnx.merge(graphdef, state)
            model(**batch)
            return recorder.sums, recorder.counts

    total = None
    for batch in batches:
        more = sums(state, dict(batch))
        total = more if total is None else jax.tree.map(jnp.add, total, more)
    if total is None:
        raise ValueError("batches=(), expected one at least")
    return {name: moment / jnp.maximum(total[1][name], 1)[..., None, None] for name, moment in total[0].items()}


@contextlib.contextmanager
def _recorded(mask: Array | None) -> Iterator[_Recorder]:
    token = _recorder.set(recorder := _Recorder(mask))
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def _recording(model: Model) -> Any:
    """A model whose maps tell the recorder what they read, layer by layer: in a loop they could not."""
    model = copied(model)
    for name, linear in linear_maps(model, ".*").items():
        if type(linear.owner) in _RECORDING and not of_filter(name):
            linear.owner.__class__ = _RECORDING[type(linear.owner)]
            linear.owner.recorded_as = name  # type: ignore[attr-defined]
    run_layer_by_layer(model)
    return model
