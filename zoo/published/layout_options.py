"""What a published layout has to hold of a model's options, and what it need not."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import ssm
from ssm.checks import inner_width
from zoo.layers.mlp import MLPConfig
from zoo.layers.moe import MoEConfig
from zoo.layers.names import unknown_name
from zoo.layers.zamba2 import Zamba2Config
from zoo.stack.backbone_config import BackboneConfig, word_config
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS
from zoo.stack.pattern import mixer_name, parse_pattern

Layout = Literal["native", "official", "transformers"]

# Options that no layout has a word for and that do not change what a model computes, and those of single mixers, which
# are compared one by one.
FREE = frozenset(
    ("dtype", "param_dtype", "remat", "scan_layers", "pattern", "dropout", "drop_path", *MIXERS, *CHANNEL_MIXERS)
)

# Options of mixers that say how to compute, or what parameters are before any training.
INITIAL = frozenset(
    ("chunk_size", "implementation", "init", "dt_min", "dt_max", "dt_floor", "dt_init", "dt_scale", "A_min", "A_max")
    + ("conv_init",)
)


def require_layout(layout: str) -> None:
    """Raises a ValueError that names the nearest, unless there is such a layout."""
    if layout not in get_args(Layout):
        raise ValueError(unknown_name("layout", layout, get_args(Layout)))


def require_same(config: Any, back: Any, *, free: Collection[str], prefix: str = "", where: str = "", layout: str):
    """Raises a ValueError that names the first option which reading a written config back gives another value.

    Args:
      config: what is written.
      back: what is read back.
      free: options that may differ.
      prefix: what comes before an option's name, such as "attn.".
      where: what comes behind its value, such as " in layer 3".
      layout: what cannot hold it, such as "layout of vim".
    """
    for field in dataclasses.fields(back):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if ours != theirs and field.name not in free:
            raise ValueError(f"{prefix}{field.name}={ours!r}{where} cannot be written in the {layout}, only {theirs!r}")


def require_same_model(
    config: BackboneConfig, back: BackboneConfig, *, free: Collection[str], layout: str, say_layer: bool = False
) -> None:
    """`require_same` for the options in full of each block's mixers, and for all others.

    Args:
      config, back, free, layout: those of `require_same`.
      say_layer: whether errors about an option of a single word, as in "attn[window=3]", say in which layer it stands.
    """
    blocks = zip(
        parse_pattern(config.pattern, config.n_layers), parse_pattern(back.pattern, back.n_layers), strict=True
    )
    for i, (ours, theirs) in enumerate(blocks):
        pairs = list(zip(sorted(ours.mixers), sorted(theirs.mixers), strict=True))
        pairs += [(ours.channel, theirs.channel)] if ours.channel and theirs.channel else []
        for mine, said in pairs:
            where = f" in layer {i}" if say_layer and "[" in f"{mine}{said}" else ""
            in_full, prefix = (resolved(config, mine), resolved(back, said)), f"{mixer_name(mine)}."
            require_same(*in_full, free=free, prefix=prefix, where=where, layout=layout)
    require_same(config, back, free=free, layout=layout)


def resolved(config: BackboneConfig, mixer: str) -> Any:
    """Options of a mixer with what follows from others filled in, and what changes no output blanked."""
    options, d_model = word_config(config, mixer), config.d_model
    if getattr(options, "out_bias", False) is None:
        options = dataclasses.replace(options, out_bias=options.bias)
    if isinstance(options, MLPConfig):
        return dataclasses.replace(options, d_ff=options.width(d_model), init="normal", dropout=0.0)
    if isinstance(options, MoEConfig):
        d_ff = options.expert().width(d_model)
        shared = options.n_shared * (options.d_ff_shared or d_ff)
        widths: dict[str, Any] = {"d_ff": d_ff, "n_shared": min(1, shared), "d_ff_shared": shared or None}
        return dataclasses.replace(options, **widths, dropout=0.0)
    if isinstance(options, ssm.Mamba2Config):
        inner = inner_width(options.expand, d_model)
        return dataclasses.replace(
            options,
            expand=inner / d_model,
            d_ssm=None if options.d_ssm == inner else options.d_ssm,
            norm_before_gate=options.rmsnorm and options.norm_before_gate,
            norm_eps=options.norm_eps if options.rmsnorm else 0.0,
        )
    if isinstance(options, ssm.MambaConfig):
        return dataclasses.replace(
            options,
            expand=inner_width(options.expand, d_model) / d_model,
            dt_rank=options.dt_rank or math.ceil(d_model / 16),
            bcdt_rms_eps=options.bcdt_rms_eps if options.bcdt_rms else 0.0,
        )
    if isinstance(options, Zamba2Config):
        return dataclasses.replace(
            options,
            n_kv_heads=options.n_kv_heads or options.n_heads,
            d_ff=options.d_ff or 4 * d_model,
            rope_base=options.rope_base if options.rope else 0.0,
        )
    heads = options.n_heads or max(1, d_model // (options.head_dim or 64))
    head_dim = options.head_dim or d_model // heads
    turns = options.position == "rope"
    return dataclasses.replace(
        options,
        n_heads=heads,
        n_kv_heads=options.n_kv_heads or heads,
        head_dim=head_dim,
        rope_base=options.rope_base if turns else 0.0,
        rope_dim=(options.rope_dim or head_dim) if turns else None,
        rope_interleaved=turns and options.rope_interleaved,
        softmax_scale=1 / math.sqrt(head_dim) if options.softmax_scale is None else options.softmax_scale,
    )
