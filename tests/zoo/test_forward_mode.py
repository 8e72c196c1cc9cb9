"""Forward mode: right inside `forward_mode`, one clear line outside; products of a Hessian with a vector always."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from tests.numerics import assert_close, normal

B, L, H, P, N = 2, 20, 2, 3, 2
HIDDEN = jax.nn.softplus


def selective_scan(u, delta, A, B, C):
    return ssm.selective_scan(u, HIDDEN(delta), -jnp.exp(A), B, C)


def ssd(x, dt, A, B, C):
    return ssm.ssd(x, HIDDEN(dt), -jnp.exp(A), B, C, chunk_size=8)


def linear_attention(q, k, v, decay):
    return ssm.linear_attention(q, k, v, -HIDDEN(decay), chunk_size=8)


def trapezoid(v, k, q, dt, A, lam):
    return ssm.trapezoid(v, k, q, HIDDEN(dt), -jnp.exp(A), jax.nn.sigmoid(lam), chunk_size=8)


def attention(q, k, v):
    return zoo.softmax_attention(q, k, v, causal=True, implementation="blocks", block_size=8)


def experts(x, w):
    return zoo.layers.grouped_matmul.grouped_matmul(x, w, jnp.array([0, 1, 1]))


OPERATIONS = {
    "ssm.selective_scan": (selective_scan, [(B, L, H), (B, L, H), (H, N), (B, L, N), (B, L, N)]),
    "ssm.ssd": (ssd, [(B, L, H, P), (B, L, H), (H,), (B, L, 1, N), (B, L, 1, N)]),
    "linear_attention": (linear_attention, [(B, L, H, N), (B, L, 1, N), (B, L, 1, P), (B, L, H)]),
    "trapezoid": (trapezoid, [(B, L, 1, H, P), *[(B, L, 1, H, N)] * 2, *[(B, L, H)] * 3]),
    "ssm.causal_conv1d": (ssm.causal_conv1d, [(B, L, H), (H, 4), (H,)]),
    "m2.fft_conv": (m2.fft_conv, [(B, L, H), (H, L)]),
    "zoo.softmax_attention": (attention, [(B, L, H, P)] * 3),
    "grouped_matmul": (experts, [(3, 4, 5), (2, 5, 6)]),
}


# The ways through a chunk that `selective_scan` and a model try, too.
SLOW = ("ssm.ssd", "linear_attention", "trapezoid", "zoo.softmax_attention")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in OPERATIONS])
def test_both_modes_agree(name, x64):
    """v . (J d) = (J' v) . d, and the Hessian's product with d is how the gradient changes along it."""
    function, shapes = OPERATIONS[name]
    keys = jax.random.split(jax.random.key(0), 2 * len(shapes))
    inputs, along = (
        [normal(key, *shape) for key, shape in zip(part, shapes, strict=True)] for part in jnp.split(keys, 2)
    )
    weigh = lambda y: sum(jnp.vdot(jnp.sin(jnp.arange(x.size)), x.ravel()) for x in jax.tree.leaves(y))  # noqa: E731
    loss = lambda inputs: weigh(function(*inputs))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    with zoo.forward_mode():
        tangent = jax.jit(lambda inputs, along: jax.jvp(loss, (inputs,), (along,))[1])(inputs, along)
        linear = jax.linearize(loss, inputs)[1](along)
    expected = sum(jnp.vdot(g, d) for g, d in zip(gradient(inputs), along, strict=True))
    assert_close([tangent, linear], [expected, expected])

    product = jax.jit(lambda inputs, along: jax.jvp(jax.grad(loss), (inputs,), (along,))[1])(inputs, along)
    step = 1e-5
    ahead, behind = (gradient([x + sign * step * d for x, d in zip(inputs, along, strict=True)]) for sign in (1, -1))
    # Central differences: their own error is of the order of step^2 and of rounding over step.
    assert_close(product, [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)], tolerance=1e-7)


def test_a_kernel_has_the_derivative_of_what_stands_for_it():
    """In float32 the scan's program has a kernel's branch, which JAX differentiates on every platform."""
    inputs = [
        normal(jax.random.key(i), *shape, dtype=jnp.float32)
        for i, shape in enumerate(OPERATIONS["ssm.selective_scan"][1])
    ]
    loss = lambda inputs: jnp.sum(jnp.sin(selective_scan(*inputs)[0]))  # noqa: E731
    product = jax.jit(lambda inputs, along: jax.jvp(jax.grad(loss), (inputs,), (along,))[1])
    assert all(jnp.any(x != 0) for x in product(inputs, inputs))
    with zoo.forward_mode():
        assert jax.jvp(loss, (inputs,), (inputs,))[1].shape == ()


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_outside_is_refused_in_a_line_that_names_the_operation(name):
    function, shapes = OPERATIONS[name]
    inputs = [jnp.ones(shape, jnp.float32) for shape in shapes]
    with pytest.raises(TypeError, match=rf"^.*{name}.* jax.jvp and jax.linearize of it go inside `with .*forward_mode"):
        jax.jvp(function, inputs, inputs)


@pytest.mark.slow
def test_a_model_goes_forward_along_its_parameters(x64):
    config = zoo.CausalLMConfig(
        d_model=8, n_layers=3, vocab_size=16, pattern="mamba2 attn/moe m2", param_dtype="float64", dtype="float64",
        mamba2=ssm.Mamba2Config(head_dim=4, d_state=2), m2=m2.M2Config(l_max=16),
        moe=zoo.MoEConfig(n_experts=2, top_k=1, d_ff=8),
    )  # fmt: skip
    graphdef, params = nnx.split(zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 10)))
    along = jax.tree.map(jnp.cos, params)
    loss = jax.jit(lambda params: jnp.mean(nnx.merge(graphdef, params)(ids)[..., :5] ** 2))
    expected = sum(map(jnp.vdot, *map(jax.tree.leaves, (jax.grad(loss)(params), along))))
    with zoo.forward_mode():
        assert_close(jax.jvp(loss, (params,), (along,))[1], expected)
