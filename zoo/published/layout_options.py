"""What a published layout has to hold of a model's options, and what it need not."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, get_args

import ssm
from ssm.checks import inner_width
from zoo.layers.mlp import MLPConfig
from zoo.layers.moe import MoEConfig
from zoo.layers.names import unknown_name
from zoo.layers.zamba2 import Zamba2Config
from zoo.stack.backbone_config import BackboneConfig, word_config
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS
from zoo.stack.pattern import Word, mixer_name, parse_pattern

Layout = Literal["native", "official", "transformers"]

# Options that no layout has a word for and that do not change what a model computes, and those of single mixers, which
# are compared one by one.
FREE = frozenset(
    (
        "dtype",
        "param_dtype",
        "remat",
        "remat_keeps",
        "remat_rounds",
        "remat_positions",
        "scan_layers",
        "pattern",
        "dropout",
        "drop_path",
        "decoder_layers",
        "decoder_pattern",
        "decoder_share",
        *MIXERS,
        *CHANNEL_MIXERS,
    )
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


class Blocker(NamedTuple):
    """One option that a layout cannot hold."""

    what: str
    """The option with its value, such as "attn.window=3"."""
    only: str = ""
    """What the layout has in place of the value; "" where nothing says it."""


class NotHeldError(ValueError):
    """A layout that cannot hold a model: `blockers` are the options in the way, all of them."""

    def __init__(self, blockers: Sequence[Blocker], layout: str):
        self.blockers = tuple(dict.fromkeys(blockers))
        (what, only), *others = self.blockers
        clauses = [f"{what} cannot be written in the {layout}" + (f", only {only}" if only else "")]
        clauses += [f"nor {what}" + (f", only {only}" if only else "") for what, only in others]
        super().__init__("; ".join(clauses))


def require_held(blockers: Sequence[Blocker], layout: str) -> None:
    """Raises a NotHeldError that names them all, unless there are none.

    Args:
      blockers: what is in the way.
      layout: of what, such as "layout of vim".
    """
    if blockers:
        raise NotHeldError(blockers, layout)


def differences(config: Any, back: Any, *, free: Collection[str], prefix: str = "", where: str = "") -> list[Blocker]:
    """The options that reading a written config back gives another value, without those that follow from another.

    Args:
      config: what is written.
      back: what is read back.
      free: options that may differ.
      prefix: what comes before an option's name, such as "attn.".
      where: what comes behind its value, such as " in layer 3".
    """
    pairs = [(field.name, getattr(config, field.name), getattr(back, field.name)) for field in dataclasses.fields(back)]
    differ = {name: (ours, theirs) for name, ours, theirs in pairs if ours != theirs and name not in free}
    if "position" in differ:
        differ = {name: values for name, values in differ.items() if not name.startswith("rope_")}
    for name in ("bcdt_rms", "qk_norm"):
        if name in differ:
            differ.pop(f"{name}_eps", None)
    if differ.get("bias") == differ.get("out_bias"):
        differ.pop("out_bias", None)
    return [Blocker(f"{prefix}{name}={ours!r}{where}", repr(theirs)) for name, (ours, theirs) in differ.items()]


def model_differences(
    config: BackboneConfig, back: BackboneConfig, *, free: Collection[str], say_layer: bool = False
) -> list[Blocker]:
    """`differences` of the options in full of each block's mixers, and of all others.

    Where a layer is of another kind of mixer, the layers of the kind are named, and their options are not compared.

    Args:
      config, back, free: those of `differences`.
      say_layer: whether what differs of a single word, as in "attn[window=3]", says in which layer it stands.
    """
    blocks = list(
        zip(parse_pattern(config.pattern, config.n_layers), parse_pattern(back.pattern, back.n_layers), strict=True)
    )
    found = [*_misplaced(blocks, _mixers), *_misplaced(blocks, _channel)]
    for i, (ours, theirs) in enumerate(blocks):
        pairs = list(zip(sorted(ours.mixers), sorted(theirs.mixers), strict=True)) if _alike(ours, theirs) else []
        if ours.channel and theirs.channel and _channel(ours) == _channel(theirs):
            pairs.append((ours.channel, theirs.channel))
        # Zamba2's mixer has one of Mamba-2 in it, with the options of "mamba2".
        pairs += [("mamba2", "mamba2")] if "zamba2" in _mixers(ours) and _alike(ours, theirs) else []
        for mine, said in pairs:
            where = f" in layer {i}" if say_layer and "[" in f"{mine}{said}" else ""
            in_full, prefix = (resolved(config, mine), resolved(back, said)), f"{mixer_name(mine)}."
            found += differences(*in_full, free=free, prefix=prefix, where=where)
    return list(dict.fromkeys(found + differences(config, back, free=free)))


def _misplaced(blocks: Sequence[tuple[Word, Word]], kinds: Callable[[Word], tuple[str, ...]]) -> list[Blocker]:
    """The layers of each kind of ours, where theirs are others."""
    pairs = [(kinds(ours), kinds(theirs)) for ours, theirs in blocks]
    lost = dict.fromkeys(ours for ours, theirs in pairs if ours and ours != theirs)
    places = {kind: [i for i, (ours, _) in enumerate(pairs) if ours == kind] for kind in lost}
    return [Blocker(f"{'+'.join(kind)} in layers {layers}") for kind, layers in places.items()]


def _mixers(word: Word) -> tuple[str, ...]:
    return tuple(sorted(map(mixer_name, word.mixers)))


def _channel(word: Word) -> tuple[str, ...]:
    return (mixer_name(word.channel),) if word.channel else ()


def _alike(ours: Word, theirs: Word) -> bool:
    return _mixers(ours) == _mixers(theirs)


def in_whole_widths(options: Any, d_model: int) -> Any:
    """Options of Mamba or Mamba-2 with the nearest inner width that is a multiple of d_model, and heads that divide it.

    For the layouts that say the width by a whole number: what they cannot say then shows in what is read back.
    """
    expand = max(1, round(options.expand))
    if isinstance(options, ssm.Mamba2Config):
        head_dim = math.gcd(expand * d_model, options.head_dim)
        return dataclasses.replace(options, expand=float(expand), head_dim=head_dim, d_ssm=None)
    return dataclasses.replace(options, expand=float(expand))


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
        qk_norm_eps=options.qk_norm_eps if options.qk_norm else 0.0,
        softmax_scale=1 / math.sqrt(head_dim) if options.softmax_scale is None else options.softmax_scale,
    )
