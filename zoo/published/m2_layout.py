"""The published layout of M2-BERT: its config.json and its tensors.

The file says nothing of what the mixers' filters were built from beyond their sizes, and holds the same tensor under
several names: a filter's frequencies appear at each of its sines, and the head's matrix is the embedding.

Source: bert/src/configuration_bert.py, bert_layers.py and mm/ in HazyResearch/m2; config.json of the models on the hub.
"""

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from flax import nnx

from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from m2.filters import decay_rates, times
from zoo.models.encoder import EncoderConfig
from zoo.models.encoder_heads import (
    MaskedLM,
    MaskedLMConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    TokenClassifier,
    TokenClassifierConfig,
)
from zoo.published.layout_options import FREE, Blocker, Layout, differences, require_held, require_layout
from zoo.published.tensors import Entry, Json, Kind, Rule, Table, renamed
from zoo.published.transformers_fields import require_numbers

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"

# What BertConfig takes where the file leaves a field out.
_DEFAULTS: Json = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "vocab_size": 30_522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "use_glu_mlp": True,
    "use_monarch_mlp": False,
    "monarch_mlp_nblocks": 4,
    "use_positional_encodings": False,
    "residual_long_conv": False,
    "bidirectional": True,
    "hyena_w_mod": 1,
    "hyena_filter_order": 64,
    "hyena_training_additions": False,
    "pool_all": False,
    "use_cls_token": False,
}
# Experiments of the official code that no published model uses.
_UNSUPPORTED = ("attention_pooling", "sequence_token_planting", "expand_positional_embeddings")
# Options of ours that the file has no word for and that change no output; the filter's are compared apart.
_FREE = FREE | {
    "vocab_size",
    "pad_vocab_multiple",
    "n_labels",
    "embedding_dropout",
    "classifier_dropout",
    "mask_padding",
}
_FREE |= {"implementation", "lr_scale", "features_lr_scale", "init", "train_freq", "d_ff", "filter"}


def is_m2_bert(raw: Json) -> bool:
    """Whether a config is of this layout."""
    return raw.get("model_type") == "m2_bert" or "monarch_mixer_sequence_mixing" in raw


def read_config(
    raw: Json, tensors: Collection[str] = (), n_labels: int = 0
) -> MaskedLMConfig | SequenceClassifierConfig:
    """The model that an M2-BERT config describes.

    Args:
      raw: config.json.
      tensors: the names in the weight file, which say what is on top of the encoder: a masked language model's head
        ("cls."), or a pooler and perhaps a classifier. Without any, a masked language model's.
      n_labels: rows of the classifier.

    Raises:
      ValueError: an option that there is none for here: names it.
    """
    for name in _UNSUPPORTED:
        if raw.get(name):
            raise ValueError(f"{name}={raw[name]!r} is not supported: no published model uses it")
    if not raw.get("monarch_mixer_sequence_mixing", True):
        raise ValueError("monarch_mixer_sequence_mixing=false: a BERT with attention, not a Monarch Mixer")
    for name in ("long_conv_l_max", "hyena_w", "hyena_emb_dim"):
        if name not in raw:
            raise ValueError(f"the config says nothing of {name}, which has no default")
    raw = _DEFAULTS | raw
    require_numbers(raw, _DEFAULTS)
    activation = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(raw["hidden_act"])
    if activation != "gelu":
        raise ValueError(f"hidden_act={raw['hidden_act']!r}, expected 'gelu'")
    dropout = float(raw["hidden_dropout_prob"])
    fields: dict[str, Any] = {
        "d_model": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "pattern": "m2/monarch",
        "causal": not raw["bidirectional"],
        "mixer_residual": False,
        "norm_eps": float(raw["layer_norm_eps"]),
        "vocab_size": raw["vocab_size"],
        "max_len": raw["max_position_embeddings"] if raw["use_positional_encodings"] else None,
        "type_vocab_size": raw["type_vocab_size"],
        "embedding_dropout": dropout,
        "mask_padding": False,
        "m2": M2Config(
            l_max=raw["long_conv_l_max"],
            residual_long_conv=raw["residual_long_conv"],
            training_additions=raw["hyena_training_additions"],
            filter=HyenaFilterConfig(
                emb_dim=raw["hyena_emb_dim"],
                order=raw["hyena_filter_order"],
                w=float(raw["hyena_w"]),
                w_mod=float(raw["hyena_w_mod"]),
            ),
        ),
        "monarch": MonarchMLPConfig(
            d_ff=raw["intermediate_size"],
            gated=raw["use_glu_mlp"],
            n_blocks=raw["monarch_mlp_nblocks"] if raw["use_monarch_mlp"] else 1,
            dropout=dropout,
        ),
    }
    if not tensors or any(name.startswith("cls.") for name in tensors):
        return MaskedLMConfig(**fields)
    return SequenceClassifierConfig(
        **fields,
        n_labels=n_labels,
        pool="mean" if raw["pool_all"] else "first",
        pooler=any(name.startswith("bert.pooler.") for name in tensors) and not raw["use_cls_token"],
        classifier_dropout=float(raw.get("classifier_dropout") or dropout),
    )


def write_config(config: EncoderConfig, layout: Layout) -> Json:
    """The config.json of an M2-BERT, as `read_config` reads it.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    require_layout(layout)
    if layout != "official":
        raise ValueError(f"M2-BERT has no {layout} layout, only the official one")
    if config.pattern != "m2/monarch":
        raise ValueError(f"pattern={config.pattern!r} has no official layout for encoders, only 'm2/monarch'")
    if isinstance(config, TokenClassifierConfig):
        raise ValueError("M2-BERT has no layout for a TokenClassifier, only for MaskedLM and SequenceClassifier")
    m2, mlp = config.m2, config.monarch
    if isinstance(config, SequenceClassifierConfig):
        kind, mean = "BertForSequenceClassification" if config.n_labels else "BertModel", config.pool == "mean"
    else:
        kind, mean = "BertForMaskedLM", False
    raw = {
        "architectures": [kind],
        "model_type": "m2_bert",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": 12,  # of no use
        "intermediate_size": mlp.width(config.d_model),
        "hidden_act": "gelu",
        "hidden_dropout_prob": mlp.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "type_vocab_size": config.type_vocab_size,
        "max_position_embeddings": config.max_len or m2.l_max,
        "use_positional_encodings": config.max_len is not None,
        "alibi_starting_size": config.max_len or m2.l_max,
        "use_glu_mlp": mlp.gated,
        "use_monarch_mlp": mlp.n_blocks != 1,
        "monarch_mlp_nblocks": 4 if mlp.n_blocks == 1 else mlp.n_blocks,
        "monarch_mixer_sequence_mixing": True,
        "residual_long_conv": m2.residual_long_conv,
        "bidirectional": not config.causal,
        "long_conv_l_max": m2.l_max,
        "hyena_emb_dim": m2.filter.emb_dim,
        "hyena_filter_order": m2.filter.order,
        "hyena_w": m2.filter.w,
        "hyena_w_mod": m2.filter.w_mod,
        "hyena_training_additions": m2.training_additions,
        # The rest has no effect on a forward pass; the values are those of every published model.
        "long_conv_kernel_learning_rate": 1e-3,
        "hyena_lr_pos_emb": 1e-5,
        "hyena_wd": 0.1,
        "hyena_filter_dropout": 0.2,
        "use_flash_mm": False,
        "use_flash_fft": False,
        "pool_all": mean,
    }
    names: tuple[str, ...] = ()
    if isinstance(config, SequenceClassifierConfig):
        names = ("bert.pooler.dense.weight",) if config.pooler else ("bert.encoder",)
        raw |= {"num_labels": config.n_labels, "use_cls_token": not config.pooler} if config.n_labels else {}
    back = read_config(raw, names)
    blockers: list[Blocker] = []
    for prefix, ours, theirs in (
        ("", config, back),
        ("m2.", m2, back.m2),
        ("m2.filter.", m2.filter, back.m2.filter),
        ("monarch.", mlp, back.monarch),
    ):
        blockers += differences(ours, theirs, free=_FREE, prefix=prefix)
    require_held(blockers, "official layout")
    return raw


# Our names to theirs, applied one after the other.
_RENAMED: tuple[Rule, ...] = (
    (r"^encoder\.backbone\.layers\.(\d+)\.mixer\.", r"bert.encoder.layer.\1.attention."),
    (r"^encoder\.backbone\.layers\.(\d+)\.mlp\.", r"bert.encoder.layer.\1.mlp."),
    (r"^encoder\.backbone\.layers\.(\d+)\.norm2\.", r"bert.encoder.layer.\1.mlp.layernorm."),
    (r"^encoder\.norm\.", "bert.embeddings.LayerNorm."),
    (r"^encoder\.(\w+_embeddings)\.", r"bert.embeddings.\1."),
    (r"^dense\.", "cls.predictions.transform.dense."),
    (r"^norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^bias$", "cls.predictions.decoder.bias"),
    (r"^pooler\.", "bert.pooler.dense."),
    (r"\.z$", ".pos_emb.z"),
    (r"(implicit_filter(?:_rev)?)\.(\d+)\.", lambda m: f"{m[1]}.{2 * int(m[2])}."),
    (r"\.freq$", ".implicit_filter.1.freq"),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)


def tensor_table(model: MaskedLM | SequenceClassifier | TokenClassifier) -> Table:
    """The tensors of a model's file: every parameter is in exactly one, and what else the official code stores."""
    config = model.config
    entries: dict[str, Entry] = {}
    copies: dict[str, str] = {}
    constants: dict[str, np.ndarray] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *owner, leaf = map(str, path)
        name = renamed(".".join([*owner, leaf]), _RENAMED)
        kind: Kind = "same"
        if leaf in ("z", "freq"):
            kind = "row"
        elif leaf == "kernel" and owner[-1] == "short_filter":
            kind = "conv"
        elif leaf == "kernel" and owner[-1] in ("gated_layers", "wo"):
            kind = "block" if config.monarch.n_blocks == 1 else "same"
        elif leaf == "kernel":
            kind = "linear"
        entries[name] = Entry((path,), kind)
        if leaf == "freq":
            directions = ("implicit_filter",) if config.causal else ("implicit_filter", "implicit_filter_rev")
            sines = range(1, 2 * config.m2.filter.n_inner + 2, 2)
            stem = name.removesuffix("implicit_filter.1.freq")
            copies |= {f"{stem}{d}.{i}.freq": name for d in directions for i in sines if (d, i) != (directions[0], 1)}
        elif leaf == "z":
            stem = name.removesuffix("pos_emb.z")
            constants[f"{stem}pos_emb.t"] = times(config.m2.l_max)[None, :, None].astype(np.float32)
            decays = decay_rates(config.d_model, config.m2.filter)
            constants[f"{stem}modulation.deltas"] = decays[None, None].astype(np.float32)
    if config.max_len is not None:
        constants["bert.embeddings.position_ids"] = np.arange(config.max_len)[None]
    if isinstance(model, MaskedLM):
        copies["cls.predictions.decoder.weight"] = WORD_EMBEDDINGS
    # The official classifier keeps a pooler that use_cls_token passes by.
    unused = (
        r"bert\.(encoder\.flashfft|pooler)\." if isinstance(model, SequenceClassifier) else r"bert\.encoder\.flashfft\."
    )
    return Table(entries, copies, constants, ignored=re.compile(unused))
