"""Every kind of mixer inside a block, forward and gradient in one program, compiles for a TPU and for a GPU."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm
import zoo
from experiments.aot.programs import compile_for

pytestmark = pytest.mark.aot
PATTERNS = ("mamba", "mamba2", "mamba3", "linear_attn", "m2/monarch", "attn/moe", "vim", "ss2d")
GRIDS = ("vim", "ss2d")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_compiles_forward_and_backward_in_bounded_memory(target, pattern):
    config = zoo.BackboneConfig(
        d_model=128,
        n_layers=1,
        pattern=pattern,
        causal=pattern not in GRIDS,
        dtype="bfloat16",
        mamba2=ssm.Mamba2Config(d_state=64),
        mamba3=ssm.Mamba3Config(d_state=64),
        attn=zoo.AttentionConfig(n_heads=2),
        moe=zoo.MoEConfig(n_experts=4),
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((1, 1024, config.d_model), jnp.bfloat16)

    def loss(params, x):
        y = nnx.merge(graphdef, params)(x, grid=(32, 32) if pattern in GRIDS else None)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    program = compile_for(target, jax.grad(loss, argnums=(0, 1)), params, x)
    print(f"{pattern} {target.name}: {program.temporaries / 2**20:.1f} MiB, {program.seconds:.1f} s")
    # Scores of all positions, or a state for each, would be 4 MiB a head, and 32 MiB.
    assert program.temporaries < 40 * 2**20
