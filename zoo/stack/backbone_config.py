"""Shape and options of a stack of blocks, and what its pattern's mixers have of them."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

import ssm
from m2 import M2Config, MonarchMLPConfig
from zoo.layers.attention import AttentionConfig
from zoo.layers.depth_router import MoDConfig
from zoo.layers.mlp import MLPConfig
from zoo.layers.moe import MoEConfig
from zoo.layers.needs import has, needs_of
from zoo.layers.zamba2 import Zamba2Config
from zoo.stack.mixers import find_kind
from zoo.stack.option_values import settle
from zoo.stack.pattern import Word, mixer_name, parse_pattern, word_options


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Shape and options of a stack of blocks.

    Examples:
      >>> zoo.BackboneConfig(d_model=16, n_layers=4, pattern="mamba*3 attn/mlp").norm
      'rms'
    """

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    pattern: str = "mamba"
    """Mixers of the blocks, e.g. "mamba", "attn/mlp", "(mamba2*3 attn/mlp)*2 mamba2", "mamba2+attn/mlp", or Megatron's
    letters as in "M-M-M*-"; cycles to n_layers. A block of "attn/mlp:0.125" takes an eighth of the positions."""
    causal: bool = True
    """Whether positions see only themselves and earlier ones. Otherwise state spaces run both ways, averaged."""
    dropout: float = 0.0
    """Share of each mixer's output that is dropped in training."""
    drop_path: float = 0.0
    """Share of the rows that skip the last block's mixers in training, less in earlier blocks in a line from 0."""
    layer_scale: float | None = None
    """Initial value of a learned factor for each channel of each mixer's output. None: no such factors."""
    shortcut_rank: int | None = None
    """Rank of a learned map beside each sequence mixer, added to what it gives; see `Bottleneck` (PanGu-pi)."""
    adapter_width: int | None = None
    """Width of a bottleneck behind each mixer, of what it gives and added to that; see `zoo.add_adapters`."""
    residual_multiplier: float = 1.0
    """Multiplies each mixer's output before it is added to its input (Granite)."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation around each mixer, and at the end where it comes before them."""
    norm_place: Literal["pre", "post"] = "pre"
    """pre: x + mixer(norm(x)), and a last norm at the end. post: norm(x + mixer(x)), as in BERT."""
    mixer_residual: bool = True
    """Whether the sequence mixer's output is added to its input. M2-BERT's replaces it, without a norm of its own."""
    norm_eps: float = 1e-5
    """Added to the variance in normalisation."""
    norm_bias: bool = True
    """Whether norm="layer" has a bias."""
    share_norms: bool = True
    """Whether depths that share a block, as in "attn/moe@a", share its norms. False: each has its own (WideNet)."""
    first_norm: bool = True
    """Whether the first block has a norm before its sequence mixer. ModernBERT's has the embedding's alone."""
    dtype: str = "float32"
    """Dtype of the heavy computation: float32, bfloat16, float16 or float64, or jnp's of that name. Parameters stay in
    param_dtype."""
    param_dtype: str = "float32"
    """Dtype that parameters are kept in."""
    residual_in_fp32: bool = True
    """Whether the residual stream is kept in at least float32."""
    remat: bool = False
    """Whether the backward pass recomputes each block instead of keeping its insides."""
    remat_keeps: Literal["nothing", "matmuls"] = "nothing"
    """What remat keeps of a block, besides its input: nothing, or what its linear maps give, in dtype, those of Monarch
    matrices and experts and long convolutions among them. They are most of its operations and the least of its memory,
    so that "matmuls" takes some more memory and recomputes little."""
    remat_rounds: bool = False
    """With remat, and norms before mixers: whether blocks read the residual stream rounded to dtype. What is kept of it
    for the backward pass then takes half the memory where dtype is bfloat16. The stream itself stays as it is."""
    remat_positions: int | None = None
    """With remat, of how many positions at a time, for rows of any length in little memory; of m2 as many numbers,
    whole rows of some channels; of attention whole rows. None: of whole rows, as it is in any case in blocks with moe,
    with dropout, and where rows are cut over devices."""
    scan_layers: bool = False
    """Whether equal blocks are compiled once and looped over, also inside what comes several times: as many blocks are
    compiled as the canonical pattern has words. Each call stacks a copy of the parameters, where they are not kept
    stacked (`stack_layers`), as training keeps them."""
    mamba: ssm.MambaConfig = ssm.MambaConfig()
    """Options of "mamba"."""
    mamba2: ssm.Mamba2Config = ssm.Mamba2Config()
    """Options of "mamba2"."""
    mamba3: ssm.Mamba3Config = ssm.Mamba3Config()
    """Options of "mamba3"."""
    vim: ssm.MambaConfig = ssm.MambaConfig()
    """Options of "vim", Mamba-1 both ways between shared projections."""
    ss2d: ssm.SS2DConfig = ssm.SS2DConfig()
    """Options of "ss2d", Mamba-1 in several orders over an image."""
    m2: M2Config = M2Config()
    """Options of "m2"."""
    attn: AttentionConfig = AttentionConfig()
    """Options of "attn"."""
    zamba2: Zamba2Config = Zamba2Config()
    """Options of "zamba2", Mamba-2 behind a transformer that several depths share."""
    linear_attn: ssm.LinearAttentionConfig = ssm.LinearAttentionConfig()
    """Options of "linear_attn", linear attention with a decay."""
    mlp: MLPConfig = MLPConfig()
    """Options of "mlp"."""
    monarch: MonarchMLPConfig = MonarchMLPConfig()
    """Options of "monarch"."""
    moe: MoEConfig = MoEConfig()
    """Options of "moe", a mixture of experts."""
    mod: MoDConfig = MoDConfig()
    """Options of blocks with a capacity, as "attn/mlp:0.125": a mixture of depths."""

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _dtype_name(getattr(self, name)))
            if getattr(self, name) not in (known := ("bfloat16", "float16", "float32", "float64")):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {', '.join(known)}")
        settle(self)
        if self.remat_positions is not None and (self.remat_positions < 1 or not self.remat):
            raise ValueError(f"remat_positions={self.remat_positions}, expected None, or at least 1 with remat=True")
        for name in ("shortcut_rank", "adapter_width"):
            if (width := getattr(self, name)) is not None and width < 1:
                raise ValueError(f"{name}={width}, expected None or at least 1")
        if self.remat_rounds and not (self.remat and self.norm_place == "pre" and self.mixer_residual):
            raise ValueError("remat_rounds=True, expected remat=True, norm_place='pre' and mixer_residual=True with it")
        for name in ("d_model", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected 0 <= dropout < 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}, expected 0 <= drop_path < 1")
        if self.drop_path and not self.mixer_residual:
            raise ValueError(f"drop_path={self.drop_path} with mixer_residual=False: nothing is left of what skips")
        if self.remat_keeps not in ("nothing", "matmuls"):
            raise ValueError(f"remat_keeps={self.remat_keeps!r}, expected 'nothing' or 'matmuls'")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm={self.norm!r}, expected 'rms' or 'layer'")
        if self.norm_place not in ("pre", "post"):
            raise ValueError(f"norm_place={self.norm_place!r}, expected 'pre' or 'post'")
        if not self.first_norm and self.norm_place == "post":
            raise ValueError("first_norm=False, expected norm_place='pre': a block's norm comes behind its mixer")
        words = parse_pattern(self.pattern, self.n_layers)
        if not self.first_norm and words[0].shared:
            raise ValueError(f"first_norm=False, expected pattern={self.pattern!r} to begin with a block of its own")
        if not self.share_norms and not any(word.shared for word in words):
            raise ValueError(f"share_norms=False with pattern={self.pattern!r}, expected a shared block: 'attn/moe@a'")
        for word in set(words):
            for mixer in word.mixers:
                self._check_mixer(word, mixer)
            if word.channel:
                mixer_needs(self, word.channel)
            self._check_capacity(word)

    def _check_capacity(self, word: Word) -> None:
        """Whether a block's mixers can do without some of the positions."""
        if word.capacity is None:
            return
        for mixer in filter(None, (*word.mixers, word.channel)):
            if "grid" in mixer_needs(self, mixer):
                raise ValueError(
                    f"pattern={self.pattern!r}: {mixer_name(mixer)} goes by the rows and columns of an image, which "
                    f"are none without some positions; expected no capacity, given {word.capacity}"
                )
        if self.mod.weighs == "symmetric" and self.norm_place != "pre":
            raise ValueError("mod.weighs='symmetric', expected norm_place='pre': a norm undoes weights of positions")

    def _check_mixer(self, word: Word, mixer: str) -> None:
        """Whether a block can give one of its sequence mixers what it asks for."""
        name, kind, needs = mixer_name(mixer), find_kind(mixer_name(mixer)), mixer_needs(self, mixer)
        alone = len(word.mixers) == 1 and self.causal and self.norm_place == "pre"
        if has(kind.constructor, "has_norm") and not alone:
            raise ValueError(f"pattern={self.pattern!r}: expected {name} alone in its block, causal, norms before it")
        if needs and not kind.two_sided and not self.causal:
            raise ValueError(
                f"pattern={self.pattern!r}: {name} needs {', '.join(needs)} and reads one way, expected causal=True"
            )


def _dtype_name(dtype: Any) -> Any:
    """The name of a dtype that is given as an object, jnp.bfloat16; what is none stays."""
    try:
        return dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        return dtype


def word_config(config: BackboneConfig, mixer: str) -> Any:
    """The options of a word's mixer or channel mixer in full: those of the config, and in their place the word's own.

    Raises:
      ValueError: together they make no mixer.
    """
    default, given = find_kind(mixer_name(mixer)).config_default, getattr(config, mixer_name(mixer), None)
    options = given if isinstance(given, type(default)) else default  # a registered mixer mostly has no field
    try:
        return dataclasses.replace(options, **word_options(mixer))
    except ValueError as error:
        raise ValueError(f"pattern={config.pattern!r}: {mixer}: {error}") from error


def mixer_needs(config: BackboneConfig, mixer: str) -> tuple[str, ...]:
    """What a word's mixer or channel mixer needs of the stack around it; see `zoo.layers.needs`.

    Raises:
      ValueError: its options make no mixer, or it needs what there is not.
    """
    options = word_config(config, mixer)
    try:
        return needs_of(find_kind(mixer_name(mixer)).constructor, options)
    except ValueError as error:
        raise ValueError(f"pattern={config.pattern!r}: {mixer}: {error}") from error
