"""Softmax attention: the baseline mixer, and the attention layers of hybrids.

A position is known by its index and its segment (`zoo.layers.seen`); the cache stores them beside the keys. Rotary
embeddings and ALiBi depend on differences of indices only, so indices go on counting across segments.

Axes: s keys (cache slots, or positions), k key-value heads, f pairs of a head; the others as everywhere.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank, is_known
from ssm.checks import is_known_size
from ssm.conv import DepthwiseConv
from ssm.platform import by_platform
from ssm.serialization import serializable
from ssm.tensor_cut import convolve, cut, side_by_side
from zoo.layers.linear import linear
from zoo.layers.norm import norm
from zoo.layers.seen import Positions, number_positions, where_present
from zoo.layers.softmax_attention import IMPLEMENTATIONS, Implementation, softmax_attention


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Options of the attention mixer.

    Examples:
      >>> zoo.AttentionConfig(n_heads=8, n_kv_heads=2, window=128).window
      128
    """

    n_heads: int | None = None
    """Query heads. None: d_model / head_dim, with head_dim 64 unless given (at least one head)."""
    n_kv_heads: int | None = None
    """Key and value heads, shared by groups of query heads. None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head. None: d_model / n_heads, or 64."""
    position: Literal["rope", "alibi", "none"] = "rope"
    """How positions enter: rotary embedding, linear biases, or not at all."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_dim: int | None = None
    """How many dimensions of a head are rotated, its first. None: all."""
    rope_pairs: int | None = None
    """How many pairs the frequencies count to, base^(-i / rope_pairs), of which each head of keys has some, as its
    `rope_index` says (what `zoo.factorize` leaves of them). None: all, as many as are rotated."""
    rope_interleaved: bool = False
    """Whether neighbouring dimensions are rotated together, instead of one of each half (Llama)."""
    window: int | None = None
    """See only the nearest `window` positions, itself included (to either side where not causal). None: see all."""
    bias: bool = False
    """Whether the projections have biases."""
    out_bias: bool | None = None
    """Whether the output projection has one. None: as `bias` says."""
    qk_norm: bool = False
    """Whether the queries and the keys of each head are divided by their root mean square, and multiplied by a learned
    scale, before they are rotated (Qwen3)."""
    qk_norm_eps: float = 1e-6
    """Added to the mean square there."""
    d_conv: int | None = None
    """Taps of a short causal convolution of queries, keys and values, as in the official Mamba-2 hybrid. None: none."""
    softmax_scale: float | None = None
    """Multiplies the products of queries and keys. None: 1 / sqrt(head_dim)."""
    in_multiplier: float = 1.0
    """Multiplies the input, as maximal-update parametrisation may ask for (Falcon-H1)."""
    out_multiplier: float = 1.0
    """Multiplies the output."""
    implementation: Implementation | None = None
    """How it is computed: "blocks", "dense" or "cudnn"; see `zoo.layers.softmax_attention`. None: by the sizes."""

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "head_dim", "window", "rope_dim", "rope_pairs", "d_conv"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected None or at least 1")
        if self.position not in ("rope", "alibi", "none"):
            raise ValueError(f"position={self.position!r}, expected 'rope', 'alibi' or 'none'")
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(f"implementation={self.implementation!r}, expected None or one of {IMPLEMENTATIONS}")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim}, expected None or an even number")
        if self.rope_pairs is not None and self.position != "rope":
            raise ValueError(f"rope_pairs={self.rope_pairs} with position={self.position!r}, expected 'rope'")


@serializable("zoo.AttentionState")
class AttentionState(NamedTuple):
    """Keys and values of the positions so far, in slots; a slot is reused when it has left the window."""

    key: Float[Array, "b s k p"]
    value: Float[Array, "b s k p"]
    slot_index: Int[Array, "b s"]
    """Index of the position in each slot, -1 where the slot is empty."""
    slot_segment: Int[Array, "b s"]
    """Segment of the position in each slot."""
    next_index: Int[Array, "b"]
    """Index of the next position: how many were there so far."""
    segment: Int[Array, "b"]
    """Segment of the last position."""
    conv: Float[Array, "b t c"] | None = None
    """The last d_conv - 1 inputs of the short convolution, oldest first, where there is one."""


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values, over whole sequences or from a cache.

    Args:
      d_model: width of input and output.
      config: options; see `AttentionConfig`.
      causal: whether positions see only themselves and earlier ones.
      d_out: width of the output. None: d_model.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of the projections and products; softmax is at least float32.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Raises:
      ValueError: head counts that do not divide, an odd head_dim with rotary embedding, more rotated dimensions than a
        head has, a short convolution where not causal.

    Examples:
      >>> mixer = zoo.Attention(16, zoo.AttentionConfig(n_heads=2), rngs=nnx.Rngs(0))
      >>> mixer(jnp.ones((2, 10, 16))).shape
      (2, 10, 16)

    Source: Vaswani et al. 2017; rotary: Su et al. 2021, arXiv:2104.09864, in the half-split form of Llama; ALiBi: Press
      et al. 2021, arXiv:2108.12409; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; norms of queries and keys:
      Henry et al. 2020, arXiv:2010.04245, as in Qwen3, arXiv:2505.09388; convolution: mamba_ssm/modules/mha.py.
    """

    needs = ("ahead", "positions")
    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig = AttentionConfig(),
        *,
        causal: bool = True,
        d_out: int | None = None,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.causal = causal
        self.dtype = dtype
        self.n_heads = config.n_heads or max(1, d_model // (config.head_dim or 64))
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        if config.head_dim is None and d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={d_model} unless head_dim is given")
        self.head_dim = config.head_dim or d_model // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        self.rope_dim = config.rope_dim or self.head_dim
        if config.position == "rope" and self.rope_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}, expected an even number with position='rope'")
        if self.rope_dim > self.head_dim:
            raise ValueError(f"rope_dim={self.rope_dim}, expected at most head_dim={self.head_dim}")
        if config.rope_pairs is not None and config.rope_pairs < self.rope_dim // 2:
            raise ValueError(
                f"rope_pairs={config.rope_pairs}, expected at least the {self.rope_dim // 2} that are rotated"
            )
        if config.d_conv is not None and not causal:
            raise ValueError(f"d_conv={config.d_conv} with causal=False, expected None: the convolution is causal")

        options: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads, kv_heads = ("heads", self.n_heads), ("kv heads", self.n_kv_heads)  # channels, those of a head in a run
        self.q_proj = linear(d_model, self.n_heads * self.head_dim, axes=("embed", heads), **options)
        self.k_proj = linear(d_model, self.n_kv_heads * self.head_dim, axes=("embed", kv_heads), **options)
        self.v_proj = linear(d_model, self.n_kv_heads * self.head_dim, axes=("embed", kv_heads), **options)
        channels = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        conv_options: dict[str, Any] = {
            "use_bias": True,
            "param_dtype": param_dtype,
            "axis": "side by side",
            "rngs": rngs,
        }
        self.conv1d = None if config.d_conv is None else DepthwiseConv(channels, config.d_conv, **conv_options)
        options["bias"] = config.bias if config.out_bias is None else config.out_bias
        inner = self.n_heads * self.head_dim
        norm_options: dict[str, Any] = {"epsilon": config.qk_norm_eps, "param_dtype": param_dtype, "rngs": rngs}
        self.q_norm, self.k_norm = (norm(self.head_dim, **norm_options) if config.qk_norm else None for _ in range(2))
        self.rope_index = self._some_pairs(param_dtype)
        self.o_proj = linear(inner, d_out or d_model, axes=(heads, "embed"), scale=residual_scale, **options)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        positions: Int[Array, "b l"] | None = None,
        added: Sequence[Array] | None = None,
    ) -> Float[Array, "b l o"]:
        """Mixes whole sequences.

        Args:
          x: input.
          mask: False where a position is not there: no other sees it, and its output has no meaning.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          ahead: who sees what comes later, see `zoo.layers.seen`; or None.
          positions: what the rotary embedding goes by, where positions are missing between those that are given; a
            window and ALiBi count what is given. None: the same.
          added: what is added to the projections of queries, keys and values, or None.
        """
        b, length, _ = x.shape
        self._check_ahead(ahead)
        if mask is None and segment_ids is None and ahead is None and positions is None:
            q, k, v, _ = self._project(x, jnp.arange(length)[None], added=added)
            return self._out(self._attend(q, k, v))
        zeros = jnp.zeros((b,), jnp.int32)
        index, segment = number_positions(b, length, zeros, zeros, mask, segment_ids)
        turned = index if positions is None else positions
        q, k, v, _ = self._project(x, turned, added=added, mask=mask, segment_ids=segment_ids)
        segments = None if segment_ids is None else segment
        at = Positions(index, segments, ahead), Positions(where_present(index, mask), segments, ahead)
        return self._out(self._attend(q, k, v, *at))

    def received(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        positions: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l"]:
        """How much all positions that are there look at each, summed over heads. Arguments are those of `__call__`.

        It is the derivative of what attention gives by the values that it reads: not all weights are there at once.
        """
        b, length, _ = x.shape
        zeros = jnp.zeros((b,), jnp.int32)
        index, segment = number_positions(b, length, zeros, zeros, mask, segment_ids)
        turned = index if positions is None else positions
        q, k, v, _ = self._project(x, turned, mask=mask, segment_ids=segment_ids)
        at = Positions(index, segment), Positions(where_present(index, mask), segment)
        given, back = jax.vjp(lambda v: self._attend(q, k, v, *at), v)
        looks = jnp.ones_like(given) if mask is None else blank(mask, jnp.ones_like(given))
        return back(looks)[0].astype(jnp.promote_types(x.dtype, jnp.float32)).mean(axis=-1).sum(axis=-1)

    def init_state(self, batch_size: int, max_len: int | None = None) -> AttentionState:
        """An empty cache.

        Args:
          batch_size: rows.
          max_len: the most positions a row will ever hold. With a window, no more than the window is kept.

        Raises:
          ValueError: neither max_len nor a window bounds the cache, or the mixer is not causal.
        """
        if not self.causal:
            raise ValueError("causal=False: a bidirectional mixer has no state to go on from")
        bounds = [n for n in (max_len, self.config.window) if n is not None]
        if not bounds:
            raise ValueError("max_len=None, expected the number of positions to keep: attention without a window")
        slots, dtype = min(bounds), self.dtype or self.k_proj.kernel.dtype
        keys = jnp.zeros((batch_size, slots, self.n_kv_heads, self.head_dim), dtype)
        empty = jnp.full((batch_size, slots), -1, jnp.int32)
        zero = jnp.zeros((batch_size,), jnp.int32)
        conv = None if self.conv1d is None else jnp.zeros((batch_size, *self.conv1d.kernel.shape[::-1]), dtype)[:, 1:]
        return AttentionState(keys, keys, empty, jnp.zeros_like(empty), zero, zero, conv)

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: AttentionState,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        positions: Int[Array, "b l"] | None = None,
        added: Sequence[Array] | None = None,
    ) -> tuple[Float[Array, "b l o"], AttentionState]:
        """Goes on from `state` by l positions. The first belongs to the segment that the state ended in.

        A row must not grow beyond the state's slots, unless a window lets the oldest go. Of later positions, those of
        the same piece can be seen (`ahead`): the others are not there yet.

        Raises:
          ValueError: a row that grows beyond them, where shapes or values say so.
        """
        b, length, _ = x.shape
        if length == 0:
            return self._out(jnp.zeros((b, 0, self.n_heads, self.head_dim), self.dtype or x.dtype)), state
        self._check_ahead(ahead)
        self._check_room(state, length, mask)
        index, segment = number_positions(b, length, state.next_index, state.segment, mask, segment_ids)
        present = where_present(index, mask)
        turned = index if positions is None else positions
        q, k, v, conv = self._project(x, turned, state.conv, added=added, mask=mask, segment_ids=segment_ids)
        after = self._write(state, k, v, present, segment)._replace(conv=conv)
        if self.config.window is not None and not (is_known_size(length) and length == 1):
            # The new positions may push out of the slots what the first of them still sees: look before writing.
            k, v = (jnp.concatenate(pair, axis=1) for pair in ((state.key, k), (state.value, v)))
            k_index = jnp.concatenate([state.slot_index, present], axis=1)
            k_segment = jnp.concatenate([state.slot_segment, segment], axis=1)
            k_ahead = None if ahead is None else jnp.pad(ahead, ((0, 0), (state.slot_index.shape[1], 0)))
        else:
            k, v, k_index, k_segment = after.key, after.value, after.slot_index, after.slot_segment
            k_ahead = None if ahead is None else _in_slots(jnp.zeros_like(k_index), ahead, present)
        at = Positions(index, segment, ahead), Positions(k_index, k_segment, k_ahead)
        return self._out(self._attend(q, k, v, *at)), after

    def _check_ahead(self, ahead):
        if ahead is not None and not self.causal:
            raise ValueError("ahead is given with causal=False, expected None: all positions see all others")

    def _check_room(self, state, length, mask):
        slots = state.slot_index.shape[1]
        if (self.config.window is not None and self.config.window <= slots) or not is_known_size(length):
            return
        rows = np.array([length]) if mask is None else np.sum(mask, axis=1) if is_known(mask) else np.array([0])
        before = np.asarray(state.next_index) if is_known(state.next_index) else np.array([0])
        if (most := int(np.max(before + rows, initial=0))) > slots:
            raise ValueError(f"{most} positions, expected at most max_len={slots}, which the state was made for")

    def _project(self, x, index, conv=None, *, added=None, mask=None, segment_ids=None):
        """Queries, keys and values, and the state of their convolution."""
        x = blank(mask, x)
        if self.config.in_multiplier != 1:
            x = x * self.config.in_multiplier
        parts = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        if added is not None:
            parts = [part + blank(mask, more) for part, more in zip(parts, added, strict=True)]
        heads = self.n_heads, self.n_kv_heads, self.n_kv_heads
        if self.conv1d is not None:
            convolved = [(part.shape[-1], n) for part, n in zip(parts, heads, strict=True)]
            inputs, positions = side_by_side(parts, convolved), {"mask": mask, "segment_ids": segment_ids}
            parts, conv = convolve(self.conv1d, inputs, conv, convolved, **positions)
        parts = [cut(part, -1, n) for part, n in zip(parts, heads, strict=True)]
        q, k, v = (rearrange(part, "b l (h p) -> b l h p", p=self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype)
        if self.config.position == "rope":
            q, k = (self._rotate(x, index) for x in (q, k))
        return q, k, v, conv

    def _some_pairs(self, param_dtype):
        """The pairs that each head of keys has, where that is not all: kept with the parameters, but never moved."""
        if (n_pairs := self.config.rope_pairs) is None:
            return None
        here = self.rope_dim // 2
        spread = jnp.arange(here) * n_pairs // here
        index = jnp.broadcast_to(spread, (self.n_kv_heads, here)).astype(param_dtype)  # any dtype holds them
        return nnx.Param(index, decay=False, axes=(None, None))

    def _rotate(self, x, index):
        options: dict[str, Any] = {"interleaved": self.config.rope_interleaved}
        if self.rope_index is not None:
            numbers = lax.stop_gradient(self.rope_index[...])
            numbers = jnp.repeat(numbers, x.shape[2] // numbers.shape[0], axis=0)
            options |= {"numbers": numbers, "n_pairs": self.config.rope_pairs}
        if self.rope_dim == self.head_dim:
            return rotate(x, index, self.config.rope_base, **options)
        turned, rest = jnp.split(x, (self.rope_dim,), axis=-1)
        return jnp.concatenate([rotate(turned, index, self.config.rope_base, **options), rest], axis=-1)

    def _attend(self, q, k, v, q_at=None, k_at=None):
        config = self.config
        return softmax_attention(
            q,
            k,
            v,
            q_at,
            k_at,
            causal=self.causal,
            window=config.window,
            slopes=alibi_slopes(self.n_heads) if config.position == "alibi" else None,
            scale=config.softmax_scale,
            implementation=config.implementation,
        )

    def _out(self, y):
        y = self.o_proj(rearrange(y, "b l h p -> b l (h p)"))
        return y if self.config.out_multiplier == 1 else y * self.config.out_multiplier

    @staticmethod
    def _write(state, k, v, present, segment):
        """Puts positions into the slots `index mod slots`; those not there, or pushed out at once, are left out."""
        latest = jnp.max(present, axis=1)
        return AttentionState(
            key=_in_slots(state.key, k, present),
            value=_in_slots(state.value, v, present),
            slot_index=_in_slots(state.slot_index, present, present),
            slot_segment=_in_slots(state.slot_segment, segment, present),
            next_index=jnp.maximum(state.next_index, latest + 1),
            segment=segment[:, -1],
        )


def _in_slots(held, new, present):
    """What the slots hold with that of new positions: of index n in slot n mod slots, the last `slots` of them."""
    slots = held.shape[1]
    latest = jnp.max(present, axis=1, keepdims=True)
    slot = jnp.where((present >= 0) & (present > latest - slots), present % slots, slots)

    one = is_known_size(new.shape[1]) and new.shape[1] == 1
    return by_platform(_put, _put, held, new.astype(held.dtype), slot, tpu=_put_one if one else _put)


def _put(held, new, slot):
    """What slots (b s ...) hold when new (b l ...) is put into those of numbers (b l); beyond the last, left out."""
    return held.at[jnp.arange(held.shape[0])[:, None], slot].set(new, mode="drop")


def _put_one(held, new, slot):
    """`_put` of one position a row, whatever axis is the last in a device's memory.

    A TPU's caches lie with the slots last, as 12 heads of 64 numbers would fill 3 of 8 parts of its tiles. To put
    something into them by index, all of them are laid out so first, and back afterwards.
    """
    here = jnp.arange(held.shape[1]) == slot
    return jnp.where(here.reshape(*here.shape, *(1,) * (held.ndim - 2)), new, held)


def rotate(
    x: Float[Array, "b l h p"],
    index: Int[Array, "#b l"],
    base: float,
    *,
    interleaved: bool = False,
    numbers: Float[Array, "h f"] | None = None,
    n_pairs: int | None = None,
) -> Float[Array, "b l h p"]:
    """Rotary position embedding: rotates the pairs (i, i + p/2) by index * base^(-2i/p) radians.

    With `interleaved`, the pairs (2i, 2i + 1) instead. With `numbers`, pair f of head h by index *
    base^(-numbers[h, f] / n_pairs): as the pair of that number of a head of n_pairs.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34 (interleaved), and Llama's pairs.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    numbers = jnp.arange(half)[None] if numbers is None else numbers
    frequency = base ** (-numbers.astype(dtype) / (n_pairs or half))
    angle = index[..., None, None].astype(dtype) * frequency  # b l h p/2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(dtype)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    if interleaved:
        return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_slopes(n_heads: int) -> Float[Array, "h"]:
    """Slope of each head's linear bias, as a penalty per position of distance.

    For a power of two, 2^(-8 i / n), i = 1..n; else the slopes of the power below, then every other one of the power
    above. Source: Press et al. 2021, arXiv:2108.12409, section 3 and its published code.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return jnp.asarray(slopes + between[: n_heads - power], jnp.float32)
