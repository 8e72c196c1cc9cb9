"""The channel mixer of Monarch Mixer: a two-layer perceptron, gated or not, with structured weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from m2.linear import BlockdiagLinear, MonarchLinear
from m2.sequence_cut import is_cut


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times the normal distribution's share below x, as PyTorch computes it.

    By erf, which is one pass on a CPU where erfc is three. In less than float32 by erfc: 1 + erf has no digits left
    there for x below -2.

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """
    if jnp.finfo(x.dtype).bits < 32:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True)
class MonarchMLPConfig:
    """Options of the Monarch channel mixer. The defaults are those of M2-BERT.

    Examples:
      >>> m2.MonarchMLPConfig(order=2).order  # two block-diagonal factors in place of one
      2
    """

    d_ff: int | None = None
    """Hidden width. None: 4 d_model."""
    gated: bool = True
    """Whether the hidden layer is a product of two halves (GLU)."""
    n_blocks: int | None = 4
    """Blocks of each factor; 1 makes it dense. None, at order 2 alone: about the root of the width."""
    order: Literal[1, 2] = 1
    """Factors of each weight: 1 is block-diagonal, as in M2-BERT; 2 is a Monarch matrix."""
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"] = "gelu"
    """Non-linearity of the hidden layer, or of its first half. "gelu" is the exact one, by erf."""
    dropout: float = 0.0
    """Share of the hidden layer that is dropped in training."""
    bias: bool = True
    """Whether the output projection has a bias. The first one has none."""

    def __post_init__(self):
        if self.d_ff is not None and self.d_ff < 1:
            raise ValueError(f"d_ff={self.d_ff}, expected None or at least 1")
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order}, expected 1 or 2")
        if self.n_blocks is None and self.order == 1:
            raise ValueError("n_blocks=None, expected at least 1 at order 1")
        if self.n_blocks is not None and self.n_blocks < 1:
            raise ValueError(f"n_blocks={self.n_blocks}, expected at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected 0 <= dropout < 1")

    def width(self, d_model: int) -> int:
        """The hidden width in a model of width d_model."""
        return self.d_ff or 4 * d_model


class MonarchMLP(nnx.Module):
    """Mixes channels, each position alone, with block-diagonal or Monarch weights.

        plain: wo(act(gated_layers(x)))        gated: (a, g) = gated_layers(x), wo(act(a) * g)

    The gated projection is one map of width 2 d_ff, cut into halves behind it. So it is not a pair of block-diagonal
    maps: with 4 blocks, pieces 0 and 1 of the hidden layer depend on pieces 0 and 2 of the input, 2 and 3 on 1 and 3.

    Examples:
      >>> m2.MonarchMLP(8, m2.MonarchMLPConfig(d_ff=16), rngs=nnx.Rngs(0))(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)

    Source: Fu et al. 2023, arXiv:2310.12109; HazyResearch/m2, bert/src/bert_layers.py, `BertGatedLinearUnitMLP` without
    the residual and the norm around it.
    """

    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: MonarchMLPConfig = MonarchMLPConfig(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        d_ff = config.width(d_model)
        options: dict[str, Any] = {
            "n_blocks": config.n_blocks,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        linear = BlockdiagLinear if config.order == 1 else MonarchLinear
        self.gated_layers = linear(d_model, 2 * d_ff if config.gated else d_ff, use_bias=False, **options)
        self.wo = linear(d_ff, d_model, use_bias=config.bias, scale=residual_scale, **options)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Float[Array, "b l d"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b l d"]:
        """Mixes the channels of every position.

        Args:
          x: input.
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Raises:
          ValueError: x has another width.
        """
        hidden = self.gated_layers(x)
        if not is_cut():  # as rows of one matrix: over two axes of positions a TPU's program is longer, and slower
            hidden = hidden.reshape(-1, hidden.shape[-1])
        # Half precision is for devices whose memory is short and whose arithmetic is not: there the gradient keeps the
        # product alone. Exact GELU, its error function and its exponential would be five times as much.
        activate = self._activate if jnp.finfo(hidden.dtype).bits >= 32 else jax.checkpoint(self._activate)
        hidden = activate(hidden)
        if rngs is not None:
            hidden = self.dropout(hidden, deterministic=False, rngs=rngs)
        y = self.wo(hidden)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _activate(self, hidden):
        act = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return act(hidden)
        activated, gate = jnp.split(hidden, 2, axis=-1)
        return act(activated) * gate
