"""The mixers that a pattern can name: what builds each, and its options where nobody changes them.

A mixer of one's own takes its place among them by one call. Whoever names it in a pattern, a flag or a saved run must
have made that call before:

    @dataclasses.dataclass(frozen=True)
    class AverageConfig:
        rate: float = 0.1

    class Average(ssm.Mixer):  # a mixer is called with x, mask= and segment_ids=, and has init_state and extend
        def __init__(self, d_model, config, *, residual_scale, dtype, param_dtype, rngs): ...

    zoo.register_mixer("average", Average, AverageConfig())
    config = zoo.CausalLMConfig(pattern="average*3 average[rate=0.01]/mlp")

One that goes by the rows and columns of an image, reads what several depths share, or adds to the loss says so by a few
attributes: `zoo.layers.needs`. The zoo's own come in by the same door.

Its options are those of the registry, and in place of them those of the word; a config of one's own with a field of its
name gives it flags, too.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ssm
from m2 import M2Config, M2Mixer, MonarchMLP, MonarchMLPConfig
from zoo.layers.attention import Attention, AttentionConfig
from zoo.layers.mlp import MLP, MLPConfig
from zoo.layers.moe import MoE, MoEConfig
from zoo.layers.zamba2 import Zamba2, Zamba2Config


class Kind(NamedTuple):
    """What a name in a pattern stands for."""

    constructor: Callable
    """constructor(d_model, config, residual_scale=, dtype=, param_dtype=, rngs=); causal= too where it is two-sided."""
    config_default: Any
    """Its options where neither the config nor the pattern says otherwise, a frozen dataclass."""
    two_sided: bool = False
    """Whether a sequence mixer looks both ways itself, given causal=False."""
    in_backbone: bool = False
    """Whether the constructor takes backbone=, the config of the whole stack."""


# BackboneConfig has a field of options for each of these names.
MIXERS: dict[str, Kind] = {
    "mamba": Kind(ssm.Mamba, ssm.MambaConfig()),
    "mamba2": Kind(ssm.Mamba2, ssm.Mamba2Config()),
    "mamba3": Kind(ssm.Mamba3, ssm.Mamba3Config()),
    "vim": Kind(ssm.Vim, ssm.MambaConfig(), two_sided=True),
    "ss2d": Kind(ssm.SS2D, ssm.SS2DConfig(), two_sided=True),
    "m2": Kind(M2Mixer, M2Config(), two_sided=True),
    "attn": Kind(Attention, AttentionConfig(), two_sided=True),
    "zamba2": Kind(Zamba2, Zamba2Config(), in_backbone=True),
    "linear_attn": Kind(ssm.LinearAttention, ssm.LinearAttentionConfig()),
}
CHANNEL_MIXERS: dict[str, Kind] = {
    "mlp": Kind(MLP, MLPConfig()),
    "monarch": Kind(MonarchMLP, MonarchMLPConfig()),
    "moe": Kind(MoE, MoEConfig()),
}
OURS = frozenset({*MIXERS, *CHANNEL_MIXERS})


def find_kind(name: str) -> Kind:
    """What a mixer's or channel mixer's name stands for. No name is both."""
    return MIXERS.get(name) or CHANNEL_MIXERS[name]


def register_mixer(
    name: str, constructor: Callable, config_default: Any, *, two_sided: bool = False, in_backbone: bool = False
) -> None:
    """Lets patterns name a sequence mixer of one's own. A name that is registered already gets the new mixer.

    Args:
      name: lower-case letters, digits and underscores, a letter first.
      constructor: constructor(d_model, config, residual_scale=, dtype=, param_dtype=, rngs=) gives the mixer.
      config_default: its options, a frozen dataclass.
      two_sided: whether the constructor takes causal=, and the mixer looks both ways where that is False. Otherwise an
        encoder has two of them, one for each direction.
      in_backbone: whether the constructor takes backbone=, the config of the whole stack.

    Raises:
      ValueError: a name that cannot be one, or is one of the zoo's own; options that are no dataclass.

    Examples:
      >>> import dataclasses
      >>> @dataclasses.dataclass(frozen=True)
      ... class MeanConfig:
      ...     pass
      >>> class Mean(nnx.Module):
      ...     causal = True
      ...     def __init__(self, d_model, config, *, residual_scale=1.0, dtype=None, param_dtype=None, rngs):
      ...         pass
      ...     def __call__(self, x, *, mask=None, segment_ids=None):
      ...         return jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1)[:, None]
      >>> zoo.register_mixer("mean", Mean, MeanConfig())
      >>> backbone = zoo.Backbone(zoo.BackboneConfig(d_model=16, n_layers=1, pattern="mean/mlp"), rngs=0)
      >>> backbone(jnp.ones((1, 4, 16))).shape
      (1, 4, 16)
    """
    _register(MIXERS, CHANNEL_MIXERS, name, Kind(constructor, config_default, two_sided, in_backbone))


def register_channel_mixer(name: str, constructor: Callable, config_default: Any) -> None:
    """Lets patterns name a channel mixer of one's own: mixer(x, rngs=) -> y, its dropout on where rngs is not None.

    What else it is called with is what it needs (`zoo.layers.needs`): needs = ("mask",) lets it leave out padding.
    Arguments and errors are those of `register_mixer`.

    Examples:
      >>> import dataclasses
      >>> @dataclasses.dataclass(frozen=True)
      ... class TwiceConfig:
      ...     factor: float = 2.0
      >>> class Twice(nnx.Module):
      ...     def __init__(self, d_model, config, *, residual_scale=1.0, dtype=None, param_dtype=None, rngs):
      ...         self.factor = config.factor
      ...     def __call__(self, x, *, rngs=None):
      ...         return self.factor * x
      >>> zoo.register_channel_mixer("twice", Twice, TwiceConfig())
      >>> backbone = zoo.Backbone(zoo.BackboneConfig(d_model=16, n_layers=1, pattern="mamba/twice"), rngs=0)
      >>> backbone(jnp.ones((1, 4, 16))).shape
      (1, 4, 16)
    """
    _register(CHANNEL_MIXERS, MIXERS, name, Kind(constructor, config_default))


def _register(table: dict[str, Kind], other: dict[str, Kind], name: str, kind: Kind) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}, expected lower-case letters, digits and underscores, a letter first")
    if name in OURS or name in other:
        raise ValueError(f"name={name!r} is taken, expected another than {', '.join(sorted({*OURS, *other}))}")
    if not dataclasses.is_dataclass(kind.config_default) or isinstance(kind.config_default, type):
        raise ValueError(f"config_default={kind.config_default!r}, expected an instance of a dataclass")
    table[name] = kind
