"""Connectors: from the vectors of an image's patches to those that a language model reads in their place.

    linear, mlp   each patch alone
    scan          patches read one another first, by state spaces in several orders (`zoo.layers.visual_scan`)
    queries       a few learned queries read all patches: as many tokens as there are queries, whatever the image
    vocabulary    each patch a mixture of the rows of a learned table (`zoo.layers.visual_vocabulary`)

Before each of them squares of patches may become one wide token (`pixel_shuffle`).

Axes: m tokens of an image, w width of a wide token.
"""

import dataclasses
import itertools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from m2.mlp import ACTIVATIONS
from ssm import Mamba2Config
from zoo.layers.image_tokens import sincos_positions
from zoo.layers.linear import linear
from zoo.layers.names import unknown_name
from zoo.layers.norm import norm
from zoo.layers.seen import Positions
from zoo.layers.softmax_attention import softmax_attention
from zoo.layers.visual_scan import VisualScan
from zoo.layers.visual_vocabulary import VisualVocabulary

ConnectorKind = Literal["linear", "mlp", "scan", "queries", "vocabulary"]
Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Options of what stands between an image encoder and a language model. The defaults are LLaVA's.

    Examples:
      >>> zoo.ConnectorConfig(shuffle=2).grid((16, 16))  # tokens of an image of 16 x 16 patches
      (8, 8)
    """

    kind: ConnectorKind = "mlp"
    """Which."""
    shuffle: int = 1
    """Patches to a side of the squares that become one token, their vectors end to end. 1: each is a token."""
    depth: int = 2
    """Linear maps of "mlp", and of the one behind "scan"."""
    d_hidden: int | None = None
    """Width between these maps. None: the language model's."""
    activation: str = "gelu"
    """Non-linearity between these maps."""
    bias: bool = True
    """Whether these maps have biases."""
    scan: Literal["bidirectional", "cross"] = "bidirectional"
    """Orders in which "scan" reads an image: rows both ways, or rows and columns both ways."""
    gated: bool = False
    """Whether SwiGLU follows the scan (ML-Mamba's advanced connector)."""
    mamba2: Mamba2Config = Mamba2Config(d_state=64, head_dim=32)
    """State space of each order of "scan"; its head_dim becomes the largest divisor of the width that is no larger."""
    n_queries: int = 16
    """Tokens that "queries" makes of an image."""
    n_heads: int | None = None
    """Heads with which the queries read. None: the language model's width / 64, at least one."""
    vocabulary_size: int = 1024
    """Rows of the table of "vocabulary"."""

    def __post_init__(self):
        if self.kind not in get_args(ConnectorKind):
            raise ValueError(unknown_name("kind of connector", self.kind, get_args(ConnectorKind)))
        for name in ("shuffle", "depth", "n_queries", "vocabulary_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("d_hidden", "n_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected None or at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))
        if self.scan not in ("bidirectional", "cross"):
            raise ValueError(f"scan={self.scan!r}, expected 'bidirectional' or 'cross'")

    def grid(self, grid: Grid) -> Grid:
        """Rows and columns of the tokens that an image of so many patches becomes; queries are one row.

        Raises:
          ValueError: rows or columns that `shuffle` does not divide.
        """
        if any(side % self.shuffle for side in grid):
            raise ValueError(f"shuffle={self.shuffle} must divide both sides of the {grid[0]} x {grid[1]} patches")
        if self.kind == "queries":
            return 1, self.n_queries
        return grid[0] // self.shuffle, grid[1] // self.shuffle


def pixel_shuffle(x: Float[Array, "b l d"], grid: Grid, side: int) -> Float[Array, "b m w"]:
    """Squares of patches as one token each, their vectors end to end, row by row: w = side^2 d, m = l / side^2.

    Source: Shi et al. 2016, arXiv:1609.05158 (the reverse of its shuffle); before a language model: Chen et al. 2024,
      arXiv:2404.16821 (InternVL 1.5).
    """
    if side == 1:
        return x
    return rearrange(x, "b (r s c t) d -> b (r c) (s t d)", r=grid[0] // side, s=side, t=side)


class Connector(nnx.Module):
    """What makes tokens of a language model of an image's patches.

    Args:
      d_in: width of the patches.
      d_out: width of the language model.
      config: options; see `ConnectorConfig`.
      dtype: of the computation.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Examples:
      >>> connector = zoo.Connector(8, 16, zoo.ConnectorConfig("linear"), rngs=nnx.Rngs(0))
      >>> connector(jnp.ones((2, 12, 8)), (3, 4)).shape
      (2, 12, 16)

    Source: linear: Liu et al. 2023, arXiv:2304.08485; mlp: arXiv:2310.03744 (LLaVA-1.5); scan: Huang & Hu 2024,
      arXiv:2407.19832 (ML-Mamba); queries: Bai et al. 2023, arXiv:2308.12966 (Qwen-VL, one layer of cross-attention,
      positions of the grid on the keys); vocabulary: Lu et al. 2024, arXiv:2405.20797 (Ovis).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        config: ConnectorConfig = ConnectorConfig(),
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kind, d_in, queries, rows = config.kind, d_in * config.shuffle**2, config.n_queries, config.vocabulary_size
        depth = 1 if kind == "linear" else config.depth
        widths = [d_in, *[config.d_hidden or d_out] * (depth - 1), d_out]
        self.scan = VisualScan(d_in, config.scan, config.mamba2, config.gated, **options) if kind == "scan" else None
        self.queries = Queries(d_in, d_out, queries, config.n_heads, **options) if kind == "queries" else None
        self.vocabulary = VisualVocabulary(d_in, d_out, rows, **options) if kind == "vocabulary" else None
        alone = kind in ("queries", "vocabulary")
        self.projector = None if alone else Projector(widths, config.activation, config.bias, **options)

    def __call__(self, x: Float[Array, "b l d"], grid: Grid) -> Float[Array, "b m o"]:
        """The tokens of an image, row by row: as many as `config.grid(grid)` has places.

        Args:
          x: vectors of patches, row by row.
          grid: their rows and columns.

        Raises:
          ValueError: a grid that `shuffle` does not divide.
        """
        tokens = self.config.grid(grid)
        x = pixel_shuffle(x, grid, self.config.shuffle)
        if self.queries is not None:
            return self.queries(x, (grid[0] // self.config.shuffle, grid[1] // self.config.shuffle))
        if self.vocabulary is not None:
            return self.vocabulary(x)
        assert self.projector is not None
        return self.projector(x if self.scan is None else self.scan(x, tokens))


class Projector(nnx.Module):
    """Linear maps and a non-linearity between them."""

    def __init__(self, widths: list[int], activation: str, bias: bool, *, rngs: nnx.Rngs, **options: Any):
        self.activation = activation
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([linear(a, b, bias=bias, init="uniform", rngs=rngs, **options) for a, b in pairs])

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l o"]:
        """Maps each position alone."""
        for i, layer in enumerate(self.layers):
            x = layer(ACTIVATIONS[self.activation](x) if i else x)
        return x


class Queries(nnx.Module):
    """A few learned queries, each of which reads all patches: one layer of cross-attention.

    The keys, and they alone, have the sines and cosines of their row and column added.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_queries: int,
        n_heads: int | None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.n_heads = n_heads or max(1, d_out // 64)
        if d_out % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide the language model's width, {d_out}")
        init = jax.nn.initializers.normal(0.02)
        self.query = nnx.Param(init(rngs.params(), (n_queries, d_out), param_dtype), decay=False, axes=(None, "embed"))
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm_q, self.norm_kv, self.norm = (
            norm(d_out, "layer", epsilon=1e-6, bias=True, param_dtype=param_dtype, rngs=rngs) for _ in range(3)
        )
        self.in_proj = linear(d_in, d_out, init="uniform", **options)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linear(d_out, d_out, bias=True, init="uniform", **options) for _ in range(4)
        )
        self.out_proj = linear(d_out, d_out, bias=True, init="uniform", **options)

    def __call__(self, x: Float[Array, "b l d"], grid: Grid) -> Float[Array, "b m o"]:
        """What the queries find in an image."""
        patches = self.norm_kv(self.in_proj(x))
        q = jnp.broadcast_to(self.norm_q(self.query[...])[None], (x.shape[0], *self.query.shape)).astype(patches.dtype)
        keys = patches + sincos_positions(grid, patches.shape[-1]).astype(patches.dtype)
        inputs = (self.q_proj, q), (self.k_proj, keys), (self.v_proj, patches)
        q, k, v = (rearrange(project(x), "b l (h p) -> b l h p", h=self.n_heads) for project, x in inputs)
        q_at, k_at = (Positions(jnp.arange(n, dtype=jnp.int32)[None]) for n in (q.shape[1], k.shape[1]))
        read = softmax_attention(q, k, v, q_at, k_at, causal=False)
        return self.out_proj(self.norm(self.o_proj(rearrange(read, "b l h p -> b l (h p)"))))
