"""What a published layout has to hold of a model's options, and what it need not."""

import dataclasses
from collections.abc import Collection
from typing import Any

from zoo.backbone import BackboneConfig, word_config
from zoo.mixers import CHANNEL_MIXERS, MIXERS
from zoo.mlp import MLPConfig

# Options that no layout has a word for and that do not change what a model computes, and those of single mixers, which
# are compared one by one.
FREE = frozenset(
    ("dtype", "param_dtype", "remat", "scan_layers", "pattern", "dropout", "drop_path", *MIXERS, *CHANNEL_MIXERS)
)


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


def resolved(config: BackboneConfig, mixer: str) -> Any:
    """Options of attn or mlp with what follows from others filled in, and what changes no output blanked."""
    options, d_model = word_config(config, mixer), config.d_model
    if isinstance(options, MLPConfig):
        out_bias = options.bias if options.out_bias is None else options.out_bias
        return dataclasses.replace(options, d_ff=options.width(d_model), out_bias=out_bias, init="normal", dropout=0.0)
    heads = options.n_heads or max(1, d_model // (options.head_dim or 64))
    return dataclasses.replace(
        options,
        n_heads=heads,
        n_kv_heads=options.n_kv_heads or heads,
        head_dim=options.head_dim or d_model // heads,
        rope_base=options.rope_base if options.position == "rope" else 0.0,
    )
