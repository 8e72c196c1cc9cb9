"""The operations of a token are counted from the weights that it meets and the positions that it sees."""

import dataclasses

import pytest

import zoo
from experiments.causal.flops import flops_per_token


def test_flops_count_six_a_weight_and_the_attended_pairs():
    config = zoo.CausalLMConfig(d_model=64, n_layers=2, pattern="attn/mlp", vocab_size=96, mlp=zoo.MLPConfig(d_ff=128))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 96 * 64
    assert flops_per_token(config, 100) == 6 * weights + 2 * 12 * 64 * 50
    shared, parallel = (dataclasses.replace(config, pattern=pattern) for pattern in ("attn/mlp@a", "attn+attn/mlp"))
    assert flops_per_token(shared, 100) == flops_per_token(config, 100)
    attention = 2 * (6 * 4 * 64**2 + 12 * 64 * 50)
    assert flops_per_token(parallel, 100) == flops_per_token(config, 100) + attention


def test_flops_count_experts_as_often_as_they_are_chosen():
    dense, mixture = (
        flops_per_token(zoo.CausalLMConfig(d_model=64, pattern=pattern, vocab_size=96), 100)
        for pattern in ("-/mlp[d_ff=128,bias=true]", "-/moe[n_experts=7,top_k=1,d_ff=128,bias=true]")
    )
    assert mixture == pytest.approx(dense + 6 * 4 * 64 * 7)  # the routers
