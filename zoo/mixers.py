"""The mixers that a pattern can name: what builds each, and its options where nobody changes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ssm
from m2 import M2Config, M2Mixer, MonarchMLP, MonarchMLPConfig
from zoo.attention import Attention, AttentionConfig
from zoo.mlp import MLP, MLPConfig
from zoo.moe import MoE, MoEConfig


class Kind(NamedTuple):
    """What a name in a pattern stands for."""

    build: Callable
    """build(d_model, options, residual_scale=, dtype=, param_dtype=, rngs=), and causal= where it is two-sided."""
    options: Any
    """Its options where neither the config nor the pattern says otherwise, a frozen dataclass."""
    two_sided: bool = False
    """Whether a sequence mixer looks both ways itself, given causal=False."""


# The config has a field of options for each of these names.
MIXERS: dict[str, Kind] = {
    "mamba": Kind(ssm.Mamba, ssm.MambaConfig()),
    "mamba2": Kind(ssm.Mamba2, ssm.Mamba2Config()),
    "mamba3": Kind(ssm.Mamba3, ssm.Mamba3Config()),
    "vim": Kind(ssm.Vim, ssm.MambaConfig(), two_sided=True),
    "ss2d": Kind(ssm.SS2D, ssm.SS2DConfig(), two_sided=True),
    "m2": Kind(M2Mixer, M2Config(), two_sided=True),
    "attn": Kind(Attention, AttentionConfig(), two_sided=True),
}
CHANNEL_MIXERS: dict[str, Kind] = {
    "mlp": Kind(MLP, MLPConfig()),
    "monarch": Kind(MonarchMLP, MonarchMLPConfig()),
    "moe": Kind(MoE, MoEConfig()),
}
