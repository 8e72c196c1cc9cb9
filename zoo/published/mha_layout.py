"""The attention layers of official hybrids, such as mamba2attn-2.7b: their options and tensors.

One projection gives queries, keys and values, which a short causal convolution may mix before they are rotated.

Source: mamba_ssm/modules/mha.py and models/mixer_seq_simple.py in state-spaces/mamba.
"""

import math
import re
from typing import Any

from zoo.layers.attention import AttentionConfig
from zoo.layers.names import unknown_name
from zoo.published.tensors import Entry, Json

# What the official code takes where `attn_cfg` leaves an option out.
_DEFAULTS: Json = {
    "num_heads_kv": None,
    "head_dim": None,
    "mlp_dim": 0,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "softmax_scale": None,
    "causal": False,
    "d_conv": 0,
    "rotary_emb_dim": 0,
    "rotary_emb_base": 10_000.0,
    "rotary_emb_interleaved": False,
}


def read_attention(said: Json, d_model: int) -> AttentionConfig:
    """The attention that an `attn_cfg` describes, in a model of width d_model.

    Raises:
      ValueError: an option that it does not have, or a value that there is nothing for here: names it.
    """
    known = ["num_heads", *_DEFAULTS]
    for name in said.keys() - {*known}:
        raise ValueError(f"attn_cfg: {unknown_name('option of MHA', name, known)}")
    if "num_heads" not in said:
        raise ValueError("attn_cfg: num_heads is missing")
    said = _DEFAULTS | said
    if not said["causal"]:
        raise ValueError("attn_cfg: causal=False, the official default, is no language model; only True is supported")
    if said["mlp_dim"]:
        raise ValueError(f"attn_cfg: mlp_dim={said['mlp_dim']} is not supported, only 0")
    heads, kv_heads, turned = said["num_heads"], said["num_heads_kv"], said["rotary_emb_dim"]
    return AttentionConfig(
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if said["head_dim"] and said["head_dim"] * heads == d_model else said["head_dim"],
        position="rope" if turned else "none",
        rope_base=float(said["rotary_emb_base"]),
        rope_dim=turned or None,
        rope_interleaved=said["rotary_emb_interleaved"],
        bias=said["qkv_proj_bias"],
        out_bias=None if said["out_proj_bias"] == said["qkv_proj_bias"] else said["out_proj_bias"],
        d_conv=said["d_conv"] or None,
        softmax_scale=said["softmax_scale"],
    )


def write_attention(attn: AttentionConfig) -> Json:
    """The `attn_cfg` of attention whose options are in full (`layout_options.resolved`)."""
    turns = attn.position == "rope"
    return {
        "causal": True,
        "d_conv": attn.d_conv or 0,
        "head_dim": attn.head_dim,
        "num_heads": attn.n_heads,
        "num_heads_kv": attn.n_kv_heads,
        "out_proj_bias": attn.out_bias,
        "qkv_proj_bias": attn.bias,
        "rotary_emb_dim": attn.rope_dim if turns else 0,
        "softmax_scale": None if attn.softmax_scale == 1 / math.sqrt(attn.head_dim or 1) else attn.softmax_scale,
        **({"rotary_emb_base": attn.rope_base, "rotary_emb_interleaved": attn.rope_interleaved} if turns else {}),
    }


def fuse(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors of attention under their official names, those of its three projections in one."""
    fused: dict[str, Entry] = {}
    for name, entry in entries.items():
        if re.search(r"\.mixer\.[kv]_proj\.", name):
            continue
        if ".mixer.q_proj." in name:
            (path,) = entry.paths
            paths: Any = [tuple(f"{x}_proj" if step == "q_proj" else step for step in path) for x in "qkv"]
            entry = Entry(tuple(paths), "linear")
        fused[name.replace(".mixer.q_proj.", ".mixer.in_proj.").replace(".mixer.o_proj.", ".mixer.out_proj.")] = entry
    return fused
