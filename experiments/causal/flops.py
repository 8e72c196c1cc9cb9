"""How many floating-point operations a causal language model needs for a token, from its configuration alone."""

import zoo
from zoo.models.build import abstract
from zoo.models.flops import forward_flops


def flops_per_token(config: zoo.CausalLMConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, forward and backward: see `zoo.models.flops`."""
    return 3 * forward_flops(abstract(config), seq_len)
