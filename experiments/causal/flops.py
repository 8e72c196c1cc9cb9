"""How many floating-point operations a causal language model needs for a token, from its configuration alone."""

from typing import Any

import jax
from flax import nnx

import zoo
from zoo.models.build import abstract


def flops_per_token(config: zoo.CausalLMConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, forward and backward.

    6 for each weight of a matrix product (the embedding counts as the head, a shared block at each depth, experts as
    often as they are chosen), and for each attention layer 12 a position that is seen and channel, half of the
    positions on average. Scans, convolutions and their filters are left out: some per cent of it in models of a usual
    width.
    """
    model: Any = abstract(config)

    def weights(module):
        params = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
        return sum(
            leaf.size
            for path, leaf in params
            if (path[-1].key == "kernel" and "conv1d" not in str(path))
            or (path[-1].key == "embedding" and config.tie_embeddings)
        )

    blocks, layers = model.backbone.blocks, model.backbone.layers
    passed = weights(model) - weights(layers) + sum(map(weights, blocks))
    for mixture in (block.mlp for block in blocks if isinstance(block.mlp, zoo.MoE)):
        stacked = [leaf.size for leaf in jax.tree.leaves(nnx.state(mixture.experts)) if leaf.ndim == 3]
        passed -= sum(stacked) * (1 - mixture.config.top_k / mixture.config.n_experts)
    mixers = (mixer for layer in blocks for mixer in getattr(layer.mixer, "mixers", [layer.mixer]))
    pairs = sum(
        mixer.n_heads * mixer.head_dim * min(mixer.config.window or seq_len, seq_len) / 2
        for mixer in mixers
        if isinstance(mixer, zoo.Attention)
    )
    return 6 * passed + 12 * pairs
