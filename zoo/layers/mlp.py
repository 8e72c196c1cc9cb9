"""Dense channel mixers: the two-layer perceptron and its gated form."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from m2.mlp import ACTIVATIONS
from ssm.tensor_cut import cut
from zoo.layers.linear import linear
from zoo.layers.names import unknown_name
from zoo.layers.series_activation import SeriesActivation


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Options of the dense channel mixer. The defaults are the SwiGLU of current language models.

    Examples:
      >>> zoo.MLPConfig(d_ff=16, gated=True).activation
      'silu'
    """

    d_ff: int | None = None
    """Hidden width. None: 8/3 d_model rounded up to a multiple of 16 when gated, 4 d_model otherwise."""
    gated: bool = True
    """Whether the hidden layer is a product of two projections (GLU)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"] = "silu"
    """Non-linearity of the hidden layer, or of its gate."""
    series: int = 1
    """Terms of the non-linearity, each scaled and shifted by learned numbers; see `SeriesActivation` (PanGu-pi)."""
    bias: bool = False
    """Whether the projections have biases."""
    out_bias: bool | None = None
    """Whether the output projection has one. None: as `bias` says."""
    init: Literal["normal", "uniform"] = "normal"
    """Initial weights: GPT-2's normal(0.02), or PyTorch's uniform within 1 / sqrt(fan_in), as beside Mamba-3."""
    dropout: float = 0.0
    """Share of the hidden layer that is dropped in training."""
    gate_multiplier: float = 1.0
    """Multiplies what the activation is taken of, as maximal-update parametrisation may ask for (Falcon-H1)."""
    out_multiplier: float = 1.0
    """Multiplies the output."""

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))
        if self.series < 1:
            raise ValueError(f"series={self.series}, expected at least 1")
        if self.d_ff is not None and self.d_ff < 1:
            raise ValueError(f"d_ff={self.d_ff}, expected None or at least 1")
        if self.init not in ("normal", "uniform"):
            raise ValueError(f"init={self.init!r}, expected 'normal' or 'uniform'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected 0 <= dropout < 1")

    def width(self, d_model: int) -> int:
        """The hidden width in a model of width d_model."""
        return self.d_ff or (-(-8 * d_model // 48) * 16 if self.gated else 4 * d_model)


class MLP(nnx.Module):
    """Mixes channels, each position alone.

        plain: down(act(up(x)))        gated: down(act(gate(x)) * up(x))

    Examples:
      >>> zoo.MLP(8, zoo.MLPConfig(d_ff=16), rngs=nnx.Rngs(0))(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)

    Source: Shazeer 2020, arXiv:2002.05202, eq. 5-6 (gated, no biases).
    """

    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: MLPConfig = MLPConfig(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = config.activation
        self.gate_multiplier, self.out_multiplier = config.gate_multiplier, config.out_multiplier
        self.d_ff = config.width(d_model)

        options: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options["init"] = config.init
        self.gate_proj = linear(d_model, self.d_ff, axes=("embed", "inner"), **options) if config.gated else None
        self.up_proj = linear(d_model, self.d_ff, axes=("embed", "inner"), **options)
        out_bias = config.bias if config.out_bias is None else config.out_bias
        options |= {"bias": out_bias, "axes": ("inner", "embed")}
        self.down_proj = linear(self.d_ff, d_model, scale=residual_scale, **options)
        self.dropout = nnx.Dropout(config.dropout)
        terms = (self.d_ff, config.series, config.activation)
        self.terms = SeriesActivation(*terms, param_dtype=param_dtype) if config.series > 1 else None

    def __call__(self, x: Float[Array, "b l d"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b l d"]:
        """Mixes the channels of every position; `rngs`' stream "dropout" switches dropout on."""
        gate = self.up_proj(x) if self.gate_proj is None else self.gate_proj(x)
        activate = ACTIVATIONS[self.activation] if self.terms is None else self.terms
        hidden = activate(gate if self.gate_multiplier == 1 else gate * self.gate_multiplier)
        if self.gate_proj is not None:
            hidden = hidden * self.up_proj(x)
        if rngs is not None:
            hidden = self.dropout(hidden, deterministic=False, rngs=rngs)
        y = self.down_proj(cut(hidden, -1))
        return y if self.out_multiplier == 1 else y * self.out_multiplier
