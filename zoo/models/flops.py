"""How many floating-point operations a token costs, from a model's parameters alone.

2 for each weight of a matrix product that a token meets (experts as often as they are chosen, what depths share at each
of them), and for each attention layer 4 a position that is seen and channel: half of the positions on average where it
looks back only. Blocks with a capacity take that share of the positions. Scans, convolutions and their filters are left
out: some per cent of it in models of a usual width. Training costs three times as much, forward and backward.
"""

from typing import Any

import jax
from flax import nnx

from zoo.layers.attention import Attention
from zoo.layers.moe import MoE
from zoo.stack.backbone import Backbone
from zoo.stack.block import shared_name

# Parameters that are matrices of a product: nnx.Linear's and block-diagonal ones, and the two of a Monarch matrix.
MATRICES = ("kernel", "w1", "w2")


def weights_met(module: nnx.Module) -> float:
    """Weights of matrix products that each token meets in a module."""
    params = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    sizes = (leaf.size for path, leaf in params if path[-1].key in MATRICES and "conv1d" not in str(path))
    met = float(sum(sizes))
    for _, mixture in nnx.iter_modules(module):
        if isinstance(mixture, MoE):
            stacked = [leaf.size for leaf in jax.tree.leaves(nnx.state(mixture.experts)) if leaf.ndim == 3]
            met -= sum(stacked) * (1 - mixture.config.top_k / mixture.config.n_experts)
    return met


def attended(module: nnx.Module, seq_len: int) -> float:
    """Positions times channels that a token sees on average, in all attention of a module."""
    seen = 0.0
    for _, mixer in nnx.iter_modules(module):
        if isinstance(mixer, Attention):
            reach = min(mixer.config.window or seq_len, seq_len)
            positions = reach / 2 if mixer.causal else min(2 * reach, seq_len)
            seen += mixer.n_heads * mixer.head_dim * positions
    return seen


def read_at(backbone: Backbone, depth: int) -> list[nnx.Module]:
    """The modules that a depth of a stack runs: its block, and those that it shares with others."""
    word, modules = backbone.words[depth], dict(zip(backbone.shared_names, backbone.shared, strict=True))
    mixers = [mixer for mixer in (*word.mixers, word.channel) if mixer]
    names = dict.fromkeys(shared_name(backbone.config, mixer) for mixer in mixers)
    return [backbone.blocks[depth], *(modules[name] for name in names if name is not None)]


def depth_flops(backbone: Backbone, depth: int, seq_len: int) -> float:
    """Operations of one depth for a token of a row of `seq_len`."""
    capacity = backbone.words[depth].capacity or 1
    reach = max(1, round(capacity * seq_len))
    modules = read_at(backbone, depth)
    return capacity * sum(2 * weights_met(module) + 4 * attended(module, reach) for module in modules)


def forward_flops(model: Any, seq_len: int) -> float:
    """Operations of a causal language model for a token of a row of `seq_len`, forward."""
    depths = range(len(model.backbone.words))
    rows = model.embedding.embedding.shape[0] if model.lm_head is None else 0
    head = rows * model.config.d_model if model.lm_head is None else weights_met(model.lm_head)
    return 2 * head + sum(depth_flops(model.backbone, depth, seq_len) for depth in depths)
