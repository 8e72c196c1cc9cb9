"""Rows for the choices of a mixture of experts: in blocks, each of one expert's choices alone.

Axis letters: `s` the experts chosen at a position · `c` blocks of `q` rows.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssm.checks import is_known_size

# Rows of a block where the number of choices is not known yet (`jax.export`). Those that fill blocks up are at most
# this many for each expert, and each block reads a matrix.
SYMBOLIC_BLOCK = 32


class Layout(NamedTuple):
    """Room for the choices of every expert, in blocks of rows."""

    row: Int[Array, "b l s"]
    """The row of each choice, past the last one where it has none."""
    group: Int[Array, "c"] | None
    """The expert of each block. None: block e is of expert e."""
    n_blocks: Any
    size: Any
    """Rows of a block."""


def _queue(experts, n_experts):
    """(each entry's place in the queue of its expert, in order; the queues' lengths). Entries n_experts join none."""
    order = jnp.argsort(experts, stable=True)
    lengths = jnp.zeros(n_experts, jnp.int32).at[experts].add(1, mode="drop")
    starts = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    queued = experts[order]
    places = jnp.arange(experts.shape[0], dtype=jnp.int32) - starts.at[queued].get(mode="clip")
    return jnp.zeros(experts.shape[0], jnp.int32).at[order].set(places), lengths


def lay_out(experts: Int[Array, "b l s"], n_experts: int) -> Layout:
    """Room for every choice: the choices of each expert in blocks of its own, one expert after the other.

    Args:
      experts: the choices; n_experts stands for none.
      n_experts: how many there are.
    """
    # A block is half of an expert's even share, so that rows that fill up blocks cost at most half as much again.
    n_choices = math.prod(experts.shape)
    known = is_known_size(n_choices)
    size = min(128, max(1, n_choices // (2 * n_experts))) if known else SYMBOLIC_BLOCK
    used = min(n_experts, n_choices) if known else n_experts
    n_blocks = (n_choices + used * (size - 1)) // size
    places, lengths = _queue(experts.reshape(-1), n_experts)
    ends = jnp.cumsum(-(-lengths // size))  # in blocks
    starts = jnp.append(0, ends)[:-1] * size
    row = starts.at[experts].get(mode="clip") + places.reshape(experts.shape)
    group = jnp.minimum(jnp.searchsorted(ends, jnp.arange(n_blocks), side="right"), n_experts - 1)
    return Layout(jnp.where(experts < n_experts, row, n_blocks * size), group, n_blocks, size)


def lay_out_within_capacity(
    experts: Int[Array, "b l s"], n_experts: int, capacity_factor: float, *, of: int | None = None
) -> Layout:
    """As much room for each expert: the first C = ceil(capacity_factor l s / n_experts) of each row of the batch.

    Where the experts are some of more, `of` is how many there are.

    Neither other rows nor later positions decide whether there is room for a position, though l, the length of the
    rows with their padding, does.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 3, for each row of the batch and top_k choices.
    """
    b, l, s = experts.shape
    factor = Fraction(capacity_factor).limit_denominator(10_000)  # exact, and for an l that is not known yet as well
    capacity = -(-factor.numerator * l * s // (factor.denominator * (of or n_experts)))
    if not is_known_size(l) or capacity > l:
        capacity = jax.core.min_dim(capacity, l)
    places, _ = jax.vmap(lambda row: _queue(row, n_experts))(experts.reshape(b, l * s))
    places = places.reshape(experts.shape)
    row = (experts * b + jnp.arange(b)[:, None, None]) * capacity + places
    return Layout(jnp.where(places < capacity, row, n_experts * b * capacity), None, n_experts, b * capacity)


def to_rows(x: Float[Array, "b l d"], layout: Layout) -> Float[Array, "c q d"]:
    """Every position in each of its rows, in blocks. Rows of no choice are 0."""
    tokens = x.reshape(-1, x.shape[-1])
    token = jnp.broadcast_to(jnp.arange(tokens.shape[0]).reshape(*x.shape[:2], 1), layout.row.shape)
    source = jnp.full(layout.n_blocks * layout.size, tokens.shape[0]).at[layout.row].set(token, mode="drop")
    return tokens.at[source].get(mode="fill", fill_value=0).reshape(layout.n_blocks, layout.size, -1)


def from_rows(blocks: Float[Array, "c q d"], layout: Layout) -> Float[Array, "b l s d"]:
    """The row of every choice. That of a choice without one is 0."""
    return blocks.reshape(layout.n_blocks * layout.size, -1).at[layout.row].get(mode="fill", fill_value=0)
