"""The layouts of transformers' encoders with attention: BERT and ModernBERT.

What lies on top of the encoder is told by the tensors in the file, since a config does not say it: a masked language
model's head, a classifier of rows or of tokens (spans are two classes of tokens), or nothing, as in the models of
sentence-transformers. Those say in 1_Pooling/config.json beside it how a row becomes a vector.

Probabilities of attention are never dropped here: attention_probs_dropout_prob and attention_dropout mean nothing.

Source: transformers' configuration_ and modeling_{bert,modernbert}.py; Devlin et al. 2018, arXiv:1810.04805; Warner et
al. 2024, arXiv:2412.13663.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, cast

import numpy as np
from flax import nnx

from zoo.layers.attention import AttentionConfig
from zoo.layers.mlp import MLPConfig
from zoo.layers.pooling import Pool
from zoo.models.encoder import EncoderConfig
from zoo.models.encoder_heads import (
    MaskedLM,
    MaskedLMConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    TokenClassifier,
    TokenClassifierConfig,
)
from zoo.published.json_files import read_json
from zoo.published.layout_options import FREE, Blocker, model_differences, require_held, resolved
from zoo.published.tensors import Entry, Json, Table, renamed
from zoo.published.transformers_fields import (
    class_names,
    read_activation,
    require_numbers,
    require_plain_rope,
    write_activation,
)
from zoo.stack.backbone_config import word_config
from zoo.stack.pattern import Word, parse_pattern

Family = Literal["bert", "modernbert"]
Tensor = TypeVar("Tensor")
WORD_EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
POOLING_FILE = "1_Pooling/config.json"

# What transformers takes where a config leaves a field out.
_DEFAULTS: dict[str, Json] = {
    "bert": {
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
    "modernbert": {
        "vocab_size": 50_368,
        "hidden_size": 768,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "local_attention": 128,
        "embedding_dropout": 0.0,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "classifier_pooling": "cls",
        "classifier_bias": False,
        "classifier_activation": "gelu",
    },
}
# Options that change the model and that there is none for here, with the one value that is taken.
_FIXED: dict[str, Json] = {
    "bert": {
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    "modernbert": {"decoder_bias": True, "tie_word_embeddings": True},
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
_POOLING = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}
# Options that may differ when a written config is read back.
_FREE = FREE | {
    "residual_in_fp32",
    "embedding_dropout",
    "classifier_dropout",
    "n_labels",
    "vocab_size",
    "pad_vocab_multiple",
}


def is_bert(raw: Json) -> bool:
    """Whether a config is of one of these layouts."""
    return raw.get("model_type") in _DEFAULTS


def short_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that `tensor_table` knows them by, out of a file's.

    The encoder goes without the prefix that it has below a head; norms have weights and biases, not the gammas and
    betas of BERT's first files; the head's bias has one of its two names; and a span's ends are classes of tokens.

    Raises:
      ValueError: two tensors of one name.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(bert|model)\.", "", name)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)).replace("qa_outputs.", "classifier.")
        if name == "cls.predictions.decoder.bias" and "cls.predictions.bias" not in tensors:
            name = "cls.predictions.bias"
        if name in renamed:
            raise ValueError(f"two tensors are {name}, with and without a prefix or under an older name")
        renamed[name] = tensor
    return renamed


def full_name(name: str, config: EncoderConfig) -> str:
    """A tensor's name in the file, out of the short one."""
    bare = isinstance(config, SequenceClassifierConfig) and not config.n_labels
    if bare or not re.match(r"(embeddings|encoder|layers|pooler|final_norm)\.", name):
        return name
    return {"bert": "bert.", "modernbert": "model."}[_family(config)] + name


def read_pooling(folder: Path, *, leave_dense: bool = False) -> Json | None:
    """What a folder of sentence-transformers says of pooling, or None.

    Args:
      leave_dense: whether linear maps behind the pooling are the caller's.

    Raises:
      ValueError: a module behind it that changes vectors by parameters of its own.
    """
    modules, path = folder / "modules.json", folder / POOLING_FILE
    if modules.is_file():
        for module in read_json(modules, list):
            kind = str(module["type"]).rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize", *(("Dense",) if leave_dense else ())):
                raise ValueError(f"{modules}: a module of type {kind} is not supported")
            if kind == "Pooling":
                if Path(module["path"]).is_absolute() or ".." in Path(module["path"]).parts:
                    raise ValueError(f"{modules}: a module in {module['path']!r:.80}, expected a folder beside it")
                path = folder / module["path"] / "config.json"
    return read_json(path) if path.is_file() else None


def read_config(
    raw: Json, tensors: Collection[str] = (), n_labels: int = 0, pooling: Json | None = None
) -> MaskedLMConfig | SequenceClassifierConfig | TokenClassifierConfig:
    """The model that a config of BERT or ModernBERT describes.

    Args:
      raw: config.json.
      tensors: the short names in the weight file, which say what is on top. Without any, a masked language model's.
      n_labels: rows of the classifier.
      pooling: what `read_pooling` found.

    Raises:
      ValueError: an option or a head that there is none for here: names it.
    """
    family = raw["model_type"]
    for name, value in _FIXED[family].items():
        if raw.get(name, value) != value:
            raise ValueError(f"{name}={raw[name]!r} is not supported, only {value!r}")
    raw = _DEFAULTS[family] | {name: value for name, value in raw.items() if value is not None}
    require_numbers(raw, _DEFAULTS[family])
    fields = _read_bert(raw) if family == "bert" else _read_modernbert(raw)
    head = "cls.predictions." if family == "bert" else "decoder."
    if not tensors or any(name.startswith(head) for name in tensors):
        activation = _activation(raw, "hidden_act" if family == "bert" else "classifier_activation")
        return MaskedLMConfig(
            **fields, head_activation=activation, head_bias=family == "bert" or raw["classifier_bias"]
        )
    if n_labels and family == "modernbert":
        fields |= {"head_activation": _activation(raw, "classifier_activation"), "head_bias": raw["classifier_bias"]}
    pooled = family == "bert" and "pooler.dense.weight" in tensors
    dropout = float(raw.get("classifier_dropout") or raw.get("hidden_dropout_prob") or 0)
    kinds = " ".join(raw.get("architectures") or ())  # old files of token classifiers hold a pooler that they ignore
    of_tokens = family == "bert" and not pooled
    if n_labels and (re.search("ForTokenClassification|ForQuestionAnswering", kinds) or of_tokens):
        return TokenClassifierConfig(**fields, n_labels=n_labels, classifier_dropout=dropout)
    pool: Pool = "mean" if family == "modernbert" and raw["classifier_pooling"] == "mean" else "first"
    if pooling is not None:
        pool, pooled = _read_pool(pooling), False
    return SequenceClassifierConfig(**fields, n_labels=n_labels, pool=pool, pooler=pooled, classifier_dropout=dropout)


def _read_bert(raw: Json) -> Json:
    return {
        "d_model": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "pattern": "attn/mlp",
        "dropout": float(raw["hidden_dropout_prob"]),
        "norm_eps": float(raw["layer_norm_eps"]),
        "vocab_size": raw["vocab_size"],
        "pad_vocab_multiple": 1,
        "max_len": raw["max_position_embeddings"],
        "type_vocab_size": raw["type_vocab_size"],
        "embedding_dropout": float(raw["hidden_dropout_prob"]),
        "attn": AttentionConfig(n_heads=raw["num_attention_heads"], position="none", bias=True),
        "mlp": MLPConfig(
            d_ff=raw["intermediate_size"], gated=False, activation=_activation(raw, "hidden_act"), bias=True
        ),
    }


def _read_modernbert(raw: Json) -> Json:
    n_layers = raw["num_hidden_layers"]
    every = raw.get("global_attn_every_n_layers", 3)
    kinds = raw.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(n_layers)]
    if len(kinds) != n_layers or (unknown := {*kinds} - {"full_attention", "sliding_attention"}):
        said = f"{len(kinds)}" if len(kinds) != n_layers else ", ".join(sorted(unknown))
        raise ValueError(f"layer_types has {said}, expected {n_layers} of full_attention and sliding_attention")
    bases = {
        kind: _rope_base(raw, kind, old, default)
        for kind, old, default in (
            ("full_attention", "global_rope_theta", 160_000.0),
            ("sliding_attention", "local_rope_theta", 10_000.0),
        )
    }
    # Theirs is the whole width, ours one side and the position itself.
    near = f"[rope_base={bases['sliding_attention']:.17g},window={raw['local_attention'] // 2 + 1}]"
    words = [f"attn{near if kind == 'sliding_attention' else ''}/mlp" for kind in kinds]
    return {
        "d_model": raw["hidden_size"],
        "n_layers": n_layers,
        "pattern": _shortest_pattern(words),
        "norm_place": "pre",
        "norm_eps": float(raw["norm_eps"]),
        "norm_bias": raw["norm_bias"],
        "first_norm": False,
        "vocab_size": raw["vocab_size"],
        "pad_vocab_multiple": 1,
        "max_len": None,
        "type_vocab_size": 0,
        "embedding_dropout": float(raw["embedding_dropout"]),
        "attn": AttentionConfig(
            n_heads=raw["num_attention_heads"], rope_base=bases["full_attention"], bias=raw["attention_bias"]
        ),
        "mlp": MLPConfig(
            d_ff=raw["intermediate_size"],
            activation=_activation(raw, "hidden_activation"),
            bias=raw["mlp_bias"],
            dropout=float(raw["mlp_dropout"]),
        ),
    }


def _rope_base(raw: Json, kind: str, old_name: str, default: float) -> float:
    """Base of the rotary frequencies: in `rope_parameters`, in files before transformers 5 a field of its own."""
    parameters = (raw.get("rope_parameters") or {}).get(kind) or {}
    require_plain_rope(raw.get("rope_scaling") or {}, "rope_scaling")
    require_plain_rope(parameters, f"rope_parameters: {kind}")
    base: Any = parameters.get("rope_theta", raw.get(old_name, default))
    return float(base)


def _shortest_pattern(words: list[str]) -> str:
    """The pattern of some blocks: one period of them, equal neighbours counted."""
    period = next(p for p in range(1, len(words) + 1) if words[p:] == words[:-p])
    runs = [(word, len([*same])) for word, same in itertools.groupby(words[:period])]
    return " ".join(word if count == 1 else f"{word}*{count}" for word, count in runs)


def _activation(raw: Json, field: str) -> Any:
    return read_activation(raw[field], field, _ACTIVATIONS)


def _read_pool(pooling: Json) -> Any:
    said = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if name[:13] == "pooling_mode_" and on]
    if "pooling_mode" in pooling:  # newer files have one name, or several
        modes = pooling["pooling_mode"] if isinstance(pooling["pooling_mode"], list) else [pooling["pooling_mode"]]
        said = [{"cls": "cls_token", "mean": "mean_tokens"}.get(mode, str(mode)) for mode in modes]
    if len(said) != 1 or said[0] not in _POOLING:
        raise ValueError(f"{POOLING_FILE}: pooling by {', '.join(said) or 'nothing'}, expected {' or '.join(_POOLING)}")
    return _POOLING[said[0]]


def _family(config: EncoderConfig) -> Family:
    return "bert" if config.norm_place == "post" else "modernbert"


def write_config(config: EncoderConfig) -> Json:
    """The config.json of a BERT or ModernBERT, as `read_config` reads it.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    words = parse_pattern(config.pattern, config.n_layers)
    if {word.plain for word in words} != {Word(("attn",), "mlp")}:
        raise ValueError(
            f"pattern={config.pattern!r} has no transformers layout for encoders; those that have one: attn/mlp, with "
            "norms behind the mixers (BERT) or before them (ModernBERT)"
        )
    family = _family(config)
    raw = _write_bert(config, words) if family == "bert" else _write_modernbert(config, words)
    kind, names = _head(config, family)
    raw |= {
        "architectures": [kind],
        "model_type": family,
        "vocab_size": config.padded_vocab_size,  # padding rows are tokens like others there
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": resolved(config, words[0].mixers[0]).n_heads,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "dtype": config.param_dtype,
        "pad_token_id": 0 if family == "bert" else None,
    }
    n_labels = getattr(config, "n_labels", 0)
    if n_labels:
        raw |= class_names(n_labels)
        raw["classifier_dropout"] = getattr(config, "classifier_dropout", 0.0)
    free, unpooled, pooled = _FREE, None, cast(Any, config)
    if _has_pooling(config) and config.pool not in _POOLING.values():
        free, unpooled = _FREE | {"pool"}, Blocker(f"pool={config.pool!r}", ", ".join(_POOLING.values()))
    pooling = write_pooling(dataclasses.replace(pooled, pool="mean") if unpooled else config)
    back = read_config(raw, names, n_labels, pooling)
    blockers = model_differences(config, back, free=free, say_layer=True)
    if unpooled:
        blockers.insert(0, unpooled)
    if family == "bert" and not config.type_vocab_size:
        blockers.insert(0, Blocker("type_vocab_size=0", "1 or more"))
    require_held(blockers, f"transformers layout of {family}")
    return raw


def _head(config: EncoderConfig, family: Family) -> tuple[str, Collection[str]]:
    """Which class of transformers' a model is, and the names that tell it."""
    prefix = {"bert": "Bert", "modernbert": "ModernBert"}[family]
    if isinstance(config, MaskedLMConfig):
        return f"{prefix}ForMaskedLM", ()
    if isinstance(config, SequenceClassifierConfig):
        kind = f"{prefix}ForSequenceClassification" if config.n_labels else f"{prefix}Model"
        # Without a pooler, a classifier of rows would be read as one of tokens.
        return kind, ("pooler.dense.weight",) if config.pooler or config.n_labels else ("encoder",)
    return f"{prefix}ForTokenClassification", ("classifier.weight",)


def write_pooling(config: EncoderConfig) -> Json | None:
    """The 1_Pooling/config.json of a model without a head, or None where the others say it all."""
    if not _has_pooling(config):
        return None
    on = next((name for name, pool in _POOLING.items() if pool == config.pool), None)
    if on is None:
        raise ValueError(f"pool={config.pool!r} cannot be written, only {', '.join(_POOLING.values())}")
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": config.d_model} | {f"pooling_mode_{name}": name == on for name in modes}


def _has_pooling(config: EncoderConfig) -> TypeGuard[SequenceClassifierConfig]:
    """Whether a file beside the model says how its rows are pooled."""
    return isinstance(config, SequenceClassifierConfig) and not config.n_labels and not config.pooler


def pooling_files(config: EncoderConfig) -> dict[str, Any]:
    """What sentence-transformers reads besides the model itself: file to content."""
    pooling = write_pooling(config)
    if pooling is None:
        return {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    return {POOLING_FILE: pooling, "modules.json": modules}


def _write_bert(config: EncoderConfig, words: tuple[Word, ...]) -> Json:
    mlp = word_config(config, words[0].channel or "")
    return {
        "intermediate_size": mlp.width(config.d_model),
        "hidden_act": write_activation(mlp.activation, _ACTIVATIONS),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_len,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
    }


def _write_modernbert(config: EncoderConfig, words: tuple[Word, ...]) -> Json:
    mlp = word_config(config, words[0].channel or "")
    attention = [word_config(config, word.mixers[0]) for word in words]
    near = next((a for a in attention if a.window is not None), AttentionConfig(window=65))
    far = next((a for a in attention if a.window is None), AttentionConfig(rope_base=160_000.0))
    raw = {
        "intermediate_size": mlp.width(config.d_model),
        "hidden_activation": write_activation(mlp.activation, _ACTIVATIONS),
        "max_position_embeddings": 8192,  # of no use
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": attention[0].bias,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention" if a.window is None else "sliding_attention" for a in attention],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": options.rope_base}
            for kind, options in (("full_attention", far), ("sliding_attention", near))
        },
        "local_attention": 2 * ((near.window or 1) - 1),
        "embedding_dropout": config.embedding_dropout,
        "mlp_bias": mlp.bias,
        "mlp_dropout": mlp.dropout,
        "decoder_bias": True,
    }
    raw |= {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
    activation = getattr(config, "head_activation", None)
    if activation is not None:
        raw |= {
            "classifier_activation": write_activation(activation, _ACTIVATIONS),
            "classifier_bias": getattr(config, "head_bias", False),
        }
    if isinstance(config, SequenceClassifierConfig):
        raw["classifier_pooling"] = "mean" if config.pool == "mean" else "cls"
    return raw


# Our names to theirs, applied one after the other.
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "bert": (
        (r"^encoder\.backbone\.layers\.(\d+)\.mixer\.o_proj", r"encoder.layer.\1.attention.output.dense"),
        (r"^encoder\.backbone\.layers\.(\d+)\.mixer\.q_proj", r"encoder.layer.\1.attention.self.query"),
        (r"^encoder\.backbone\.layers\.(\d+)\.mixer\.k_proj", r"encoder.layer.\1.attention.self.key"),
        (r"^encoder\.backbone\.layers\.(\d+)\.mixer\.v_proj", r"encoder.layer.\1.attention.self.value"),
        (r"^encoder\.backbone\.layers\.(\d+)\.norm\.", r"encoder.layer.\1.attention.output.LayerNorm."),
        (r"^encoder\.backbone\.layers\.(\d+)\.mlp\.up_proj", r"encoder.layer.\1.intermediate.dense"),
        (r"^encoder\.backbone\.layers\.(\d+)\.mlp\.down_proj", r"encoder.layer.\1.output.dense"),
        (r"^encoder\.backbone\.layers\.(\d+)\.norm2\.", r"encoder.layer.\1.output.LayerNorm."),
        (r"^encoder\.norm\.", "embeddings.LayerNorm."),
        (r"^encoder\.(\w+_embeddings)\.", r"embeddings.\1."),
        (r"^(dense)\.", r"cls.predictions.transform.\1."),
        (r"^norm\.", "cls.predictions.transform.LayerNorm."),
        (r"^bias$", "cls.predictions.bias"),
        (r"^pooler\.", "pooler.dense."),
    ),
    "modernbert": (
        (r"^encoder\.backbone\.(layers\.\d+)\.mixer\.o_proj", r"\1.attn.Wo"),
        (r"^encoder\.backbone\.(layers\.\d+)\.mixer\.q_proj", r"\1.attn.Wqkv"),
        (r"^encoder\.backbone\.(layers\.\d+)\.norm\.", r"\1.attn_norm."),
        (r"^encoder\.backbone\.(layers\.\d+)\.mlp\.gate_proj", r"\1.mlp.Wi"),
        (r"^encoder\.backbone\.(layers\.\d+)\.mlp\.down_proj", r"\1.mlp.Wo"),
        (r"^encoder\.backbone\.(layers\.\d+)\.norm2\.", r"\1.mlp_norm."),
        (r"^encoder\.backbone\.norm_f\.", "final_norm."),
        (r"^encoder\.norm\.", "embeddings.norm."),
        (r"^encoder\.word_embeddings\.", "embeddings.tok_embeddings."),
        (r"^(dense|norm)\.", r"head.\1."),
        (r"^bias$", "decoder.bias"),
    ),
}
# Matrices that are one tensor there, one above the other.
_FUSED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


def tensor_table(model: MaskedLM | SequenceClassifier | TokenClassifier) -> Table:
    """The tensors of a model's file under their short names, and what else a file may hold."""
    family = _family(model.config)
    entries: dict[str, Entry] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *owner, leaf = map(str, path)
        name = ".".join([*owner, leaf])
        parts: tuple[str, ...] = ("",)
        if family == "modernbert" and owner and owner[-1] in sum(_FUSED.values(), ()):
            if owner[-1] not in _FUSED:
                continue
            parts = _FUSED[owner[-1]]
        name = renamed(name, [*_RENAMED[family], (r"\.(kernel|scale|embedding)$", ".weight")])
        paths = tuple((*path[:-2], part, path[-1]) if part else path for part in parts)
        entries[name] = Entry(paths, "linear" if leaf == "kernel" or len(paths) > 1 else "same")
    copies, constants = {}, {}
    if isinstance(model, MaskedLM):
        head = "cls.predictions.decoder" if family == "bert" else "decoder"
        copies[f"{head}.weight"] = WORD_EMBEDDINGS[family == "modernbert"]
        if family == "bert":
            copies[f"{head}.bias"] = "cls.predictions.bias"
    if model.config.max_len is not None:
        constants["embeddings.position_ids"] = np.arange(model.config.max_len)[None]
    # BERT's pooler is of use to its next-sentence head, which is not kept, and to classifiers of rows alone.
    unused = r"cls\.seq_relationship\.|pooler\." if "pooler.dense.weight" not in entries else r"(?!)"
    return Table(entries, copies, constants, ignored=re.compile(unused))
