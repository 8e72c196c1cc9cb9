"""Which positions go through a block, and what it then counts: mixture of depths.

Each position has a number of the router's; in training those with the largest go through the block, a fixed share of
each document, and the others around it. That looks at the whole row. A causal model foretells it from the position
alone: when it is evaluated or generates, each goes through the block whose predictor says that it would.

Source: Raposo et al. 2024, arXiv:2404.02258 (mixture of depths); Zhang et al. 2024, arXiv:2412.04449 (p-MoD: weights
within a fifth of 1, some positions alone, fewer with depth).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from ssm import segment_runs
from ssm.absent import blank
from zoo.layers.linear import linear
from zoo.layers.rngs import Seed, as_rngs

PARTS = 10_000
"""Capacities are whole numbers of such parts, so that a share of positions is exact in 32 bits."""


@dataclasses.dataclass(frozen=True)
class MoDConfig:
    """How blocks with a capacity choose their positions: those of "attn/mlp:0.125".

    Examples:
      >>> zoo.MoDConfig(gate="tanh", weighs="symmetric", decides="top_k").gate  # as p-MoD does it
      'tanh'
    """

    gate: Literal["linear", "sigmoid", "tanh"] = "linear"
    """What a position's number becomes: itself (as in the paper), its sigmoid, or 1 + 0.2 tanh (p-MoD). With tanh and a
    router of zeros a block counts once, as it does without a router."""
    weighs: Literal["block", "symmetric"] = "block"
    """What that multiplies. block: all that the block adds. symmetric (p-MoD): what its channel mixer adds, or its
    sequence mixer where there is none, and the positions that go around it, so that the router learns of both."""
    decides: Literal["predictor", "router", "top_k"] = "predictor"
    """What a causal model goes by outside of training. predictor: a small network of its own, trained beside. router:
    the sign of the router's number, which is trained to say it too. top_k: as in training, among the positions of one
    call, which then sees ahead: for those that come together, as the places of an image."""
    predictor_width: int = 32
    """Hidden channels of the predictor."""
    weight: float = 0.01
    """Weight of the loss of what decides."""

    def __post_init__(self):
        for name, known in (
            ("gate", ("linear", "sigmoid", "tanh")),
            ("weighs", ("block", "symmetric")),
            ("decides", ("predictor", "router", "top_k")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.predictor_width < 1:
            raise ValueError(f"predictor_width={self.predictor_width}, expected at least 1")
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}, expected at least 0")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("positions",), meta_fields=("at_least",))
@dataclasses.dataclass(frozen=True)
class Skippable:
    """The positions that blocks may leave out; all others go through every block.

    Examples:
      >>> zoo.Skippable(jnp.array([[True, True, False]]), at_least=2).at_least
      2
    """

    positions: Bool[Array, "b l"]
    """True where a position may be left out, such as the places of images."""
    at_least: int = 0
    """How many of them there are in each row, or fewer: a block is made for the others, and its share of these."""


def share(capacity: float, n: Any) -> Any:
    """floor(capacity n), exactly, of a number, a symbol or an array of integers."""
    parts = round(capacity * PARTS)
    return n // PARTS * parts + n % PARTS * parts // PARTS


def kept_positions(
    scores: Float[Array, "b l"],
    capacity: float,
    *,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    skippable: Bool[Array, "b l"] | None = None,
) -> Bool[Array, "b l"]:
    """The positions with the largest scores: floor(capacity n) of the n of each document, the first of equal ones.

    So a document in a packed row keeps what it keeps alone, and all of them together no more than a row of one.

    Args:
      scores: a number for each position.
      capacity: the share that is kept, a multiple of 0.0001.
      mask: False where a position is not there: it is not kept, and not counted.
      segment_ids: documents packed in a row, each a run of equal ids.
      skippable: the positions to choose among. All others that are there are kept. None: all.
    """
    there = jnp.ones(scores.shape, bool) if mask is None else mask
    among = there if skippable is None else there & skippable
    nowhere = jnp.iinfo(jnp.int32).max
    run = jnp.zeros(scores.shape, jnp.int32) if segment_ids is None else segment_runs(segment_ids).astype(jnp.int32)
    place = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    run, _, where = jax.lax.sort(
        (jnp.where(among, run, nowhere), -jax.lax.stop_gradient(scores), place), dimension=1, num_keys=3
    )
    # Of each place in this order: where its document begins and ends.
    changes = run[:, 1:] != run[:, :-1]
    begins = jax.lax.cummax(jnp.where(jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True), place, 0), axis=1)
    ends = jnp.where(jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True), place, nowhere)
    ends = jax.lax.cummin(ends, axis=1, reverse=True)
    kept = (place - begins < share(capacity, ends - begins + 1)) & (run != nowhere)
    kept = jax.lax.sort((where, kept), dimension=1, num_keys=1)[1]
    return kept if skippable is None else kept | (there & ~skippable)


class DepthRouter(nnx.Module):
    """A number for each position, by which a block chooses, and what foretells the choice where it may not look ahead.

    Args:
      d_model: width of the positions.
      config: options.
      capacity: the share of the positions that the block takes, above 0, at most 1, a multiple of 0.0001.
      causal: whether the model reads from left to right.
      param_dtype: dtype of the parameters, float32 or wider.
      rngs: source of keys, stream "params", or a seed.

    Raises:
      ValueError: another capacity.

    Examples:
      >>> router = zoo.DepthRouter(8, capacity=0.5, causal=False, rngs=0)
      >>> router.choose(jnp.ones((1, 4, 8))).tolist()
      [[True, True, False, False]]
    """

    def __init__(
        self,
        d_model: int,
        config: MoDConfig = MoDConfig(),
        *,
        capacity: float,
        causal: bool,
        param_dtype: Dtype = jnp.float32,
        rngs: Seed,
    ):
        check_capacity(capacity)
        self.config, self.capacity = config, capacity
        self.foretells = causal and config.decides != "top_k"
        dtype, rngs = jnp.promote_types(param_dtype, jnp.float32), as_rngs(rngs)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.score = linear(d_model, 1, **options)
        apart = self.foretells and config.decides == "predictor"
        self.hidden = linear(d_model, config.predictor_width, bias=True, **options) if apart else None
        self.decision = linear(config.predictor_width, 1, axes=(None, None), bias=True, **options) if apart else None

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds something to its loss: where the choice is foretold."""
        return self.foretells

    def scores(self, x: Float[Array, "b l d"]) -> Float[Array, "b l"]:
        """The number of each position, in at least float32."""
        return self.score(x)[..., 0]

    def weights(self, scores: Float[Array, "b l"]) -> Float[Array, "b l"]:
        """What a block counts at each position."""
        if self.config.gate == "tanh":
            return 1 + 0.2 * jnp.tanh(scores)
        return scores if self.config.gate == "linear" else jax.nn.sigmoid(scores)

    def choose(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        skippable: Bool[Array, "b l"] | None = None,
    ) -> Bool[Array, "b l"]:
        """The positions that go through the block as it is trained; see `kept_positions`."""
        positions = {"mask": mask, "segment_ids": segment_ids, "skippable": skippable}
        return kept_positions(self.scores(x), self.capacity, **positions)

    def foretell(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        skippable: Bool[Array, "b l"] | None = None,
    ) -> Bool[Array, "b l"]:
        """The same as each position alone says it: how many they are is not fixed."""
        kept = self._logits(x) > 0
        kept = kept if skippable is None else kept | ~skippable
        return kept if mask is None else kept & mask

    def loss(
        self,
        x: Float[Array, "b l d"],
        kept: Bool[Array, "b l"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        skippable: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, ""]:
        """The weighted cross-entropy of what is foretold, in nats, against the choice; 0 where nothing is.

        Its gradient is that of the predictor alone, or of the router alone.
        """
        if not self.foretells:
            return jnp.float32(0)
        logits = self._logits(x)
        wrong = jax.nn.softplus(jnp.where(kept, -logits, logits))
        counts = jnp.ones(kept.shape, bool) if mask is None else mask
        counts = counts if skippable is None else counts & skippable
        return self.config.weight * jnp.sum(blank(counts, wrong[..., None])) / jnp.maximum(jnp.sum(counts), 1)

    def _logits(self, x):
        x = jax.lax.stop_gradient(x)
        if self.hidden is None or self.decision is None:
            return self.scores(x)
        return self.decision(jax.nn.gelu(self.hidden(x)))[..., 0]


def check_capacity(capacity: float) -> None:
    """Raises a ValueError unless it is a share that positions can be divided by."""
    if not 0 < capacity <= 1 or abs(capacity * PARTS - round(capacity * PARTS)) > 1e-6:
        raise ValueError(f"capacity={capacity}, expected more than 0, at most 1, in steps of 0.0001")
