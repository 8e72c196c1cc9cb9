"""Published models by name, each with the source of its numbers."""

import dataclasses
import math
from typing import Any, overload

import ssm
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from zoo.layers.attention import AttentionConfig
from zoo.layers.mlp import MLPConfig
from zoo.layers.moe import MoEConfig
from zoo.layers.names import unknown_name
from zoo.layers.rngs import Seed
from zoo.models.build import Kind, Model, ModelConfig, build, require_kind
from zoo.models.causal import CausalLM, CausalLMConfig
from zoo.models.encoder import EncoderConfig
from zoo.models.encoder_heads import MaskedLM, MaskedLMConfig, SequenceClassifier, SequenceClassifierConfig
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from zoo.published.preset_names import (
    CausalLMName,
    ImageClassifierName,
    MaskedLMName,
    SequenceClassifierName,
    VisionLanguageModelName,
)
from zoo.published.ssm_layout import official_mlp
from zoo.stack.hybrid import hybrid_pattern
from zoo.stack.option_values import with_values
from zoo.stack.pattern import canonical_pattern


def _mamba(d_model: int, n_layers: int) -> CausalLMConfig:
    # Source: the config.json of state-spaces/mamba-{130m,370m,790m,1.4b,2.8b}: the 50,277 tokens of GPT-NeoX in 50,280
    # rows, tied; everything else is the mixer's default. Gu & Dao 2023, arXiv:2312.00752, table 12.
    return CausalLMConfig(d_model=d_model, n_layers=n_layers, pattern="mamba", vocab_size=50_277, pad_vocab_multiple=8)


def _mamba2(d_model: int, n_layers: int) -> CausalLMConfig:
    # Source: the config.json of state-spaces/mamba2-{130m,370m,780m,1.3b,2.7b}: the same tokens in 50,288 rows.
    # Dao & Gu 2024, arXiv:2405.21060, table 10.
    return dataclasses.replace(_mamba(d_model, n_layers), pattern="mamba2", pad_vocab_multiple=16)


def _mamba3(d_model: int, n_layers: int, d_intermediate: int, *, is_mimo: bool = False) -> CausalLMConfig:
    # Source: arXiv:2603.15569, section 4 (SwiGLU blocks, the 128,256 tokens of Llama 3.1, tied); widths whose parameter
    # counts are those of the released state-spaces/mamba3-{siso,mimo}-187m; the larger ones as third parties read them.
    return CausalLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="mamba3/mlp",
        vocab_size=128_256,
        pad_vocab_multiple=8,
        mamba3=ssm.Mamba3Config(is_mimo=is_mimo),
        mlp=official_mlp(d_intermediate),
    )


def _m2_gpt(d_model: int, n_layers: int) -> CausalLMConfig:
    # Source: Fu et al. 2023, arXiv:2310.12109, section 5.3: Hyena's filters, shared as heads share them in H3, neither
    # attention nor channel mixers, the tokens of GPT-2. Neither weights nor code were published: the totals, 145M and
    # 360M, are the paper's; the width, the depth and the 8 channels to a filter are ours.
    return CausalLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="m2",
        vocab_size=50_257,
        m2=M2Config(l_max=2048, n_filters=d_model // 8, filter=HyenaFilterConfig(order=64)),
    )


def _m2_bert(d_model: int, length: int) -> MaskedLMConfig:
    # Source: bert/yamls/pretrain/monarch-mixer-*.yaml and yamls/embeddings/*.yaml in HazyResearch/m2: the 30,522 tokens
    # of bert-base-uncased in 30,528 rows, 12 layers, 4 blocks in the channel mixer.
    return MaskedLMConfig(
        d_model=d_model,
        n_layers=12,
        pattern="m2/monarch",
        mixer_residual=False,
        vocab_size=30_522,
        max_len=length,
        embedding_dropout=0.1,
        m2=M2Config(l_max=length, residual_long_conv=True),
        monarch=MonarchMLPConfig(d_ff=4 * d_model, dropout=0.1),
    )


def _m2_retrieval(length: int) -> SequenceClassifierConfig:
    # Source: the config.json of togethercomputer/m2-bert-80M-{2k,8k,32k}-retrieval; trained to see padding as text.
    base = _m2_bert(768, length)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(EncoderConfig)}
    return SequenceClassifierConfig(**fields | {"mask_padding": False}, n_labels=0)


def _mosaicbert(d_model: int, n_layers: int) -> MaskedLMConfig:
    # Source: Portes et al. 2023, arXiv:2312.17482, and mosaicml/examples, benchmarks/bert: BERT's block with ALiBi and
    # no table of positions, a GeGLU of BERT's full width with a bias on the way out alone, 30,522 tokens in 30,528
    # rows. Theirs drops the hidden layer of the channel mixer where this drops its output, as BERT does.
    return MaskedLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="attn/mlp",
        dropout=0.1,
        vocab_size=30_522,
        pad_vocab_multiple=64,
        max_len=None,
        embedding_dropout=0.1,
        attn=AttentionConfig(position="alibi", bias=True),
        mlp=MLPConfig(d_ff=4 * d_model, activation="gelu", out_bias=True),
    )


def _modernbert(d_model: int, n_layers: int, d_ff: int) -> MaskedLMConfig:
    # Source: the config.json of answerdotai/ModernBERT-{base,large}; Warner et al. 2024, arXiv:2412.13663, table 4.
    # Every third layer sees all, the others 64 positions to either side; `window` counts the position itself too.
    return MaskedLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="attn/mlp attn[rope_base=10000,window=65]/mlp*2",
        norm_place="pre",
        norm_eps=1e-5,
        norm_bias=False,
        first_norm=False,
        vocab_size=50_368,
        pad_vocab_multiple=1,
        max_len=None,
        type_vocab_size=0,
        head_bias=False,
        attn=AttentionConfig(n_heads=d_model // 64, rope_base=160_000.0),
        mlp=MLPConfig(d_ff=d_ff, activation="gelu"),
    )


def _bimamba(pattern: str) -> MaskedLMConfig:
    # Ours, for comparison with BERT-base: Mamba's blocks both ways in as many parameters (110M, within 3%), between
    # BERT's embeddings of tokens and kinds and its head, with BERT's dropout. Norms come first, and there is neither a
    # channel mixer nor a table of positions, as in Mamba.
    return MaskedLMConfig(
        d_model=768,
        n_layers=11,
        pattern=pattern,
        dropout=0.1,
        norm="rms",
        norm_place="pre",
        norm_eps=1e-5,
        vocab_size=30_522,
        max_len=None,
        embedding_dropout=0.1,
    )


def _vit(d_model: int, **fields) -> ImageClassifierConfig:
    # Source: `deit_{tiny,small,base}_patch16_224` in facebookresearch/deit, models.py; Touvron et al. 2020,
    # arXiv:2012.12877, table 1. Stochastic depth of the last block is their recipe's, 0.1.
    options = {"d_model": d_model, "n_layers": 12, "drop_path": 0.1, "n_classes": 1000, "image_size": 224}
    return ImageClassifierConfig(
        **options | {"attn": AttentionConfig(n_heads=d_model // 64, position="none", bias=True)} | fields
    )


def _m2_vit(d_model: int, n_layers: int) -> ImageClassifierConfig:
    # Source: Fu et al. 2023, arXiv:2310.12109, section 5.2: ViT-b, its attention replaced by the gated long convolution
    # both ways, its channel mixer by block-diagonal matrices (4 blocks), in 45M. Neither code nor weights were
    # published; the mean instead of a class token and filters of order 64 are ours.
    return _vit(
        d_model,
        n_layers=n_layers,
        pattern="m2/monarch",
        class_token="none",
        pool="mean",
        m2=M2Config(l_max=196, filter=HyenaFilterConfig(order=64)),
        monarch=MonarchMLPConfig(gated=False),
    )


def _vim(d_model: int) -> ImageClassifierConfig:
    # Source: `vim_{tiny,small,base}_patch16_*_midclstok_div2` in hustvl/Vim, vim/models_mamba.py; Zhu et al. 2024,
    # arXiv:2401.09417, section 4: 24 blocks without channel mixers, the class token in the middle.
    return ImageClassifierConfig(
        d_model=d_model, n_layers=24, pattern="vim", norm="rms", norm_eps=1e-5, class_token="middle", drop_path=0.1
    )


def _ss2d(d_model: int) -> ImageClassifierConfig:
    # Ours, for comparison with DeiT and Vim of these widths: VMamba's blocks (Liu et al. 2024, arXiv:2401.10166: the
    # cross scan with one state a channel, a channel mixer of ratio 4, no positions, the mean of all places) at one
    # resolution, a patch of 16 pixels. Not the published VMamba, which has four stages of growing width and falling
    # resolution, so there is no published number of parameters to meet.
    return _vit(
        d_model,
        pattern="ss2d/mlp",
        norm_eps=1e-5,
        stem="conv",
        position="none",
        class_token="none",
        pool="mean",
        ss2d=ssm.SS2DConfig(d_state=1),
    )


def _jamba(d_model: int, n_layers: int, **fields) -> CausalLMConfig:
    # Source: the config.json of ai21labs/Jamba-v0.1; Lieber et al. 2024, arXiv:2403.19887: of eight layers one attends,
    # every second one has 16 experts in place of an MLP, and nothing says positions.
    return CausalLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="(mamba/mlp mamba/moe)*2 attn/mlp mamba/moe mamba/mlp mamba/moe",
        norm_eps=1e-6,
        tie_embeddings=False,
        mamba=ssm.MambaConfig(bcdt_rms=True, bcdt_rms_weight=True),
        **fields,
    )


def _nemotron_h(d_model: int, pattern: str, **fields) -> CausalLMConfig:
    # Source: the config.json of nvidia/Nemotron-H-8B-Base-8K; arXiv:2504.03624, table 1.
    return CausalLMConfig(
        d_model=d_model,
        n_layers=len(pattern),
        pattern=canonical_pattern(pattern, len(pattern)),
        tie_embeddings=False,
        **fields,
    )


def _falcon_h1(d_model: int, n_layers: int, vocab_size: int, heads: int, d_ff: int, **fields) -> CausalLMConfig:
    # Source: Zuo et al. 2025, arXiv:2507.22448, table 5, in transformers' docs, too; totals are those of the published
    # weights. Their multipliers, which go with how they were trained, are in the files and not here.
    mixers: dict[str, Any] = {
        "attn": AttentionConfig(n_heads=heads, n_kv_heads=2, head_dim=128, rope_base=1e11),
        "mamba2": ssm.Mamba2Config(d_state=256, expand=1.0, head_dim=128, rmsnorm=False),
        "mlp": MLPConfig(d_ff=d_ff),
    }
    shape: dict[str, Any] = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab_size}
    return CausalLMConfig(**shape, pattern="mamba2+attn/mlp", tie_embeddings=False, **mixers | fields)


def _llava() -> VisionLanguageConfig:
    # Source: config.json of llava-hf/llava-1.5-7b-hf: CLIP's ViT-L/14 at 336 pixels, read before its last block, and
    # Vicuna 7B with 64 rows more for its tokens; Liu et al. 2023, arXiv:2310.03744.
    vision = _vit(
        1024,
        n_layers=24,
        drop_path=0.0,
        n_classes=0,
        image_size=336,
        patch_size=14,
        norm_eps=1e-5,
        embedding_norm=True,
        patch_bias=False,
        mlp=MLPConfig(d_ff=4096, gated=False, activation="quick_gelu", bias=True),
    )
    text = CausalLMConfig(
        d_model=4096,
        n_layers=32,
        pattern="attn/mlp",
        vocab_size=32_064,
        tie_embeddings=False,
        attn=AttentionConfig(n_heads=32),
        mlp=MLPConfig(d_ff=11_008),
    )
    return VisionLanguageConfig(vision=vision, text=text, image_token_id=32_000, vision_layer=-2)


presets: dict[str, ModelConfig] = {
    "mamba-130m": _mamba(768, 24),
    "mamba-370m": _mamba(1024, 48),
    "mamba-790m": _mamba(1536, 48),
    "mamba-1.4b": _mamba(2048, 48),
    "mamba-2.8b": _mamba(2560, 64),
    "mamba2-130m": _mamba2(768, 24),
    "mamba2-370m": _mamba2(1024, 48),
    "mamba2-780m": _mamba2(1536, 48),
    "mamba2-1.3b": _mamba2(2048, 48),
    "mamba2-2.7b": _mamba2(2560, 64),
    "mamba3-siso-187m": _mamba3(768, 12, 1536),
    "mamba3-siso-440m": _mamba3(1024, 24, 2048),
    "mamba3-siso-880m": _mamba3(1536, 24, 3072),
    "mamba3-siso-1.5b": _mamba3(2048, 24, 4096),
    "mamba3-mimo-187m": _mamba3(768, 12, 1264, is_mimo=True),
    "mamba3-mimo-440m": _mamba3(1024, 24, 1792, is_mimo=True),
    "mamba3-mimo-880m": _mamba3(1536, 24, 2800, is_mimo=True),
    "mamba3-mimo-1.5b": _mamba3(2048, 24, 3824, is_mimo=True),
    # Source: the config.json of state-spaces/mamba2attn-2.7b; arXiv:2405.21060, section 9.2.3. Six layers attend,
    # behind a short convolution; half of a head is rotated.
    "mamba2attn-2.7b": dataclasses.replace(
        _mamba2(2560, 64),
        pattern="mamba2*9 (attn mamba2*8)*5 mamba2*2 attn mamba2*7",
        attn=AttentionConfig(n_heads=30, head_dim=128, rope_dim=64, d_conv=4),
    ),
    # Source: the config.json of tiiuae/falcon-mamba-7b; arXiv:2410.05355, table 1.
    "falcon-mamba-7b": CausalLMConfig(
        d_model=4096,
        n_layers=64,
        pattern="mamba",
        vocab_size=65_024,
        tie_embeddings=False,
        mamba=ssm.MambaConfig(bcdt_rms=True),
    ),
    # Source: the params.json of mistralai/Mamba-Codestral-7B-v0.1.
    "codestral-mamba-7b": CausalLMConfig(
        d_model=4096,
        n_layers=64,
        pattern="mamba2",
        vocab_size=32_768,
        tie_embeddings=False,
        mamba2=ssm.Mamba2Config(n_groups=8),
    ),
    # Source: Waleffe et al. 2024, arXiv:2406.07887 (mamba2-hybrid-8b-3t on the hub), and examples/mamba in
    # NVIDIA/Megatron-LM. The activation is that of the example's script, which leaves it at GELU.
    "mamba2-hybrid-8b": CausalLMConfig(
        d_model=4096,
        n_layers=56,
        pattern=hybrid_pattern(56, attention=0.08, mlp=0.5),
        vocab_size=256_000,
        tie_embeddings=False,
        mamba2=ssm.Mamba2Config(n_groups=8),
        attn=AttentionConfig(n_heads=32, n_kv_heads=8, position="none"),
        mlp=MLPConfig(d_ff=16_384, gated=False, activation="gelu"),
    ),
    "jamba-52b": _jamba(
        4096,
        32,
        vocab_size=65_536,
        attn=AttentionConfig(n_heads=32, n_kv_heads=8, position="none"),
        mlp=MLPConfig(d_ff=14_336),
        moe=MoEConfig(n_experts=16, d_ff=14_336, weights="softmax"),
    ),
    # Source: the config.json of ibm-ai-platform/Bamba-9B. Half of a head is rotated.
    "bamba-9b": CausalLMConfig(
        d_model=4096,
        n_layers=32,
        pattern="mamba2/mlp*9 (attn/mlp mamba2/mlp*8)*2 attn/mlp mamba2/mlp*4",
        vocab_size=128_256,
        tie_embeddings=False,
        attn=AttentionConfig(n_heads=32, n_kv_heads=8, rope_dim=64),
        mlp=MLPConfig(d_ff=14_336),
    ),
    "nemotron-h-8b": _nemotron_h(
        4096,
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        vocab_size=131_072,
        attn=AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, position="none"),
        mamba2=ssm.Mamba2Config(n_groups=8, dt_limit=(0.001, math.inf)),
        mlp=MLPConfig(d_ff=21_504, gated=False, activation="relu2"),
    ),
    "falcon-h1-0.5b": _falcon_h1(
        1024,
        36,
        32_784,
        8,
        2048,
        attn=AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=64, rope_base=1e11),
        mamba2=ssm.Mamba2Config(expand=1.5, rmsnorm=False),
    ),
    "falcon-h1-7b": _falcon_h1(3072, 44, 130_049, 12, 12_288, pad_vocab_multiple=1),
    # Ours, of these shapes for a CPU: 256 wide, eight blocks or so, GPT-NeoX's tokens.
    "mamba2-hybrid-tiny": CausalLMConfig(
        d_model=256,
        n_layers=12,
        pattern=hybrid_pattern(12, attention=0.08, mlp=0.5),
        vocab_size=50_277,
        mamba2=ssm.Mamba2Config(d_state=64),
        attn=AttentionConfig(n_heads=4, n_kv_heads=2, position="none"),
    ),
    "jamba-tiny": _jamba(
        256,
        8,
        vocab_size=50_277,
        attn=AttentionConfig(n_heads=4, n_kv_heads=2, position="none"),
        moe=MoEConfig(n_experts=4, weights="softmax"),
    ),
    "nemotron-h-tiny": _nemotron_h(
        256,
        "M-M-M*-M-M-",
        vocab_size=50_277,
        attn=AttentionConfig(n_heads=4, n_kv_heads=2, position="none"),
        mamba2=ssm.Mamba2Config(d_state=64, n_groups=2),
        mlp=MLPConfig(gated=False, activation="relu2"),
    ),
    "falcon-h1-tiny": _falcon_h1(
        256,
        6,
        50_277,
        4,
        768,
        attn=AttentionConfig(n_heads=4, n_kv_heads=2),
        mamba2=ssm.Mamba2Config(d_state=64, rmsnorm=False),
    ),
    # Source: the config.json of HuggingFaceTB/SmolLM2-135M; Ben Allal et al. 2025, arXiv:2502.02737. Its head is tied.
    "smollm2-135m": CausalLMConfig(
        d_model=576,
        n_layers=30,
        pattern="attn/mlp",
        vocab_size=49_152,
        attn=AttentionConfig(n_heads=9, n_kv_heads=3, rope_base=100_000.0),
        mlp=MLPConfig(d_ff=1536),
    ),
    "m2-gpt-145m": _m2_gpt(1024, 22),
    "m2-gpt-360m": _m2_gpt(1280, 45),
    "m2-bert-80m": _m2_bert(768, 128),
    "m2-bert-110m": _m2_bert(960, 128),
    "m2-bert-260m": _m2_bert(1536, 128),
    "m2-bert-341m": _m2_bert(1792, 128),
    "m2-bert-80m-2k": _m2_bert(768, 2048),
    "m2-bert-80m-8k": _m2_bert(768, 8192),
    "m2-bert-80m-32k": _m2_bert(768, 32_768),
    "m2-bert-341m-2k": _m2_bert(1792, 2048),
    "m2-bert-80m-2k-retrieval": _m2_retrieval(2048),
    "m2-bert-80m-8k-retrieval": _m2_retrieval(8192),
    "m2-bert-80m-32k-retrieval": _m2_retrieval(32_768),
    # Source: the config.json of google-bert/bert-base-uncased; Devlin et al. 2018, arXiv:1810.04805, section 3.
    "bert-base": MaskedLMConfig(
        d_model=768,
        n_layers=12,
        pattern="attn/mlp",
        dropout=0.1,
        vocab_size=30_522,
        pad_vocab_multiple=1,
        max_len=512,
        embedding_dropout=0.1,
        attn=AttentionConfig(n_heads=12, position="none", bias=True),
        mlp=MLPConfig(d_ff=3072, gated=False, activation="gelu", bias=True),
    ),
    "mosaicbert-base": _mosaicbert(768, 12),
    "mosaicbert-large": _mosaicbert(1024, 24),
    "modernbert-base": _modernbert(768, 22, 1152),
    "modernbert-large": _modernbert(1024, 28, 2624),
    "bimamba-base": _bimamba("mamba"),
    "bimamba2-base": _bimamba("mamba2"),
    "vit-tiny": _vit(192),
    "vit-small": _vit(384),
    "vit-base": _vit(768),
    "deit-tiny": _vit(192, distillation="classifier"),
    "deit-small": _vit(384, distillation="classifier"),
    "deit-base": _vit(768, distillation="classifier"),
    "m2-vit-base": _m2_vit(768, 12),
    "vim-tiny": _vim(192),
    "vim-small": _vim(384),
    "vim-base": _vim(768),
    "ss2d-tiny": _ss2d(192),
    "ss2d-small": _ss2d(384),
    "llava-1.5-7b": _llava(),
}


@overload
def create(name: CausalLMName, *, rngs: Seed, kind: None = None, **overrides: Any) -> CausalLM: ...
@overload
def create(name: MaskedLMName, *, rngs: Seed, kind: None = None, **overrides: Any) -> MaskedLM: ...
@overload
def create(name: SequenceClassifierName, *, rngs: Seed, kind: None = None, **overrides: Any) -> SequenceClassifier: ...
@overload
def create(name: ImageClassifierName, *, rngs: Seed, kind: None = None, **overrides: Any) -> ImageClassifier: ...
@overload
def create(
    name: VisionLanguageModelName, *, rngs: Seed, kind: None = None, **overrides: Any
) -> VisionLanguageModel: ...
@overload
def create(name: str, *, rngs: Seed, kind: type[Kind], **overrides: Any) -> Kind: ...
@overload
def create(name: str, *, rngs: Seed, kind: None = None, **overrides: Any) -> Model: ...
def create(name: str, *, rngs: Seed, kind: type | None = None, **overrides: Any) -> Model:
    """Builds a preset's model with fresh parameters.

        create("mamba-130m", rngs=nnx.Rngs(0), n_layers=2, dtype="bfloat16")

    Args:
      name: a key of `presets`.
      rngs: source of keys, stream "params", or a seed.
      kind: the class that the model must be of. By it, or by a name that is written out, type checkers know what they
        get. None: any.
      **overrides: fields of the preset's config to replace; a dict replaces some of an options object, as in
        mamba={"d_state": 32}.

    Raises:
      ValueError: an unknown preset or field (naming the nearest known one), a model of another kind, or a value that
        the config rejects.

    Examples:
      >>> zoo.create("mamba2-130m", rngs=0, d_model=64, n_layers=1, vocab_size=32).config.pattern
      'mamba2'
    """
    if name not in presets:
        raise ValueError(unknown_name("preset", name, presets))
    require_kind(kind, presets[name], f"name={name!r}")
    return build(with_values(presets[name], overrides), rngs=rngs)
