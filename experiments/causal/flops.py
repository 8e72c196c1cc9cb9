"""How many floating-point operations a causal language model needs for a token, from its configuration alone."""

from flax import nnx

import zoo
from zoo.models.flops import forward_flops


def flops_per_token(config: zoo.CausalLMConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, forward and backward: see `zoo.models.flops`."""
    return 3 * forward_flops(nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0))), seq_len)
