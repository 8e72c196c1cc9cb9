"""Every operation, forward and gradient in one program, compiles for a TPU and for a GPU, and in how much memory.

Shapes are those of models of 130 M parameters, of one row of 1,024 positions. Temporaries are bounded by what goes in
and comes out (arguments, their gradients, outputs): what grows with the square of the length, or keeps a state for each
position, exceeds it.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import m2
import ssm
from experiments.aot.programs import compile_for
from zoo.layers.grouped_matmul import grouped_matmul
from zoo.layers.softmax_attention import softmax_attention

pytestmark = pytest.mark.aot
B, L, E, D, N, H, P = 1, 1024, 1536, 768, 16, 24, 64
Shape = jax.ShapeDtypeStruct


def bf16(*shape):
    return Shape(shape, jnp.bfloat16)


def f32(*shape):
    return Shape(shape, jnp.float32)


def from_index(function, shape):
    """`grouped_matmul` with blocks of rows for each group in turn."""
    return functools.partial(function, group=jnp.arange(shape) // 4)


MONARCH = [f32(32, 48, 24), f32(32, 48, 48)]
# Operation, arguments, and how many times the bytes of arguments, gradients and outputs it may take besides.
OPS = {
    "selective_scan": (ssm.selective_scan, [bf16(B, L, E), bf16(B, L, E), f32(E, N), bf16(B, L, N), bf16(B, L, N)], 6),
    "ssd": (ssm.ssd, [bf16(B, L, H, P), f32(B, L, H), f32(H), bf16(B, L, 1, 128), bf16(B, L, 1, 128)], 16),
    "trapezoid": (
        ssm.trapezoid,
        [bf16(B, L, 1, H, P), bf16(B, L, 1, H, 128), bf16(B, L, 1, H, 128), *[f32(B, L, H)] * 3],
        10,
    ),
    "trapezoid, 4 ranks": (
        ssm.trapezoid,
        [bf16(B, L, 4, H, P), bf16(B, L, 4, H, 128), bf16(B, L, 4, H, 128), *[f32(B, L, H)] * 3],
        10,
    ),
    "linear_attention": (
        ssm.linear_attention,
        [bf16(B, L, H, P), bf16(B, L, H, P), bf16(B, L, H, P), f32(B, L, H)],
        12,
    ),
    "causal_conv1d": (ssm.causal_conv1d, [bf16(B, L, E), f32(E, 4), f32(E)], 4),
    "depthwise_conv2d": (ssm.depthwise_conv2d, [bf16(16, 14, 14, D), f32(3, 3, D), f32(D)], 6),
    "fft_conv": (m2.fft_conv, [bf16(B, L, D), f32(D, L)], 16),
    "fft_conv, two-sided": (functools.partial(m2.fft_conv, causal=False), [bf16(B, L, D), f32(D, 2 * L)], 16),
    "causal_monarch": (m2.causal_monarch, [bf16(B, 256, D), f32(D, 256), bf16(16, 16), bf16(16, 16, 16)], 16),
    "fft_conv2d": (m2.fft_conv2d, [bf16(4, 14, 14, D), f32(D, 28, 28)], 16),
    "blockdiag_matmul": (m2.blockdiag_matmul, [bf16(B, L, D), bf16(4, D, D // 4)], 4),
    "monarch_matmul": (m2.monarch_matmul, [bf16(B, L, D), bf16(4, D, D // 4), bf16(4, D, D)], 4),
    "softmax_attention": (functools.partial(softmax_attention, causal=True), [bf16(B, 4 * L, 4, P)] * 3, 6),
    "softmax_attention, window": (
        functools.partial(softmax_attention, causal=True, window=128),
        [bf16(B, 4 * L, 4, P)] * 3,
        6,
    ),
    "grouped_matmul": (from_index(grouped_matmul, 32), [bf16(32, 64, D), bf16(8, D, 2048)], 4),
}
STEPS = {
    "selective_step": (ssm.selective_step, [f32(64, E, N), bf16(64, E), bf16(64, E), f32(E, N), *[bf16(64, N)] * 2]),
    "ssd_step": (
        ssm.ssd_step,
        [f32(64, H, P, 128), bf16(64, H, P), f32(64, H), f32(H), bf16(64, 1, 128), bf16(64, 1, 128)],
    ),
}


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", OPS)
def test_an_operation_compiles_forward_and_backward_in_bounded_memory(target, name):
    operation, arguments, times = OPS[name]

    def both(*arguments):
        out, pull = jax.vjp(operation, *arguments)
        return out, pull(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), out))

    program = compile_for(target, both, *arguments)
    there = bytes_of(arguments) + bytes_of(jax.eval_shape(both, *arguments))
    print(f"{name} {target.name}: {program.temporaries / there:.2f} {program.seconds:.1f} s")
    assert program.temporaries < times * there


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_a_recurrence_compiles_and_works_in_place(target, name):
    operation, arguments = STEPS[name]
    program = compile_for(target, jax.jit(operation, donate_argnums=0), *arguments)
    assert program.aliased >= bytes_of(arguments[0])
    assert program.temporaries < bytes_of(arguments[0])
