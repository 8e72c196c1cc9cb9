"""Blocks of rows times the matrices of their groups, against the product of each block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import assert_close, normal
from zoo.layers import reference
from zoo.layers.grouped_matmul import grouped_matmul

GROUP = jnp.array([0, 0, 2, 2, 2, 3])  # nothing for group 1


def value_and_gradients(product, x, w):
    weight = normal(jax.random.key(2), x.shape[0], x.shape[1], w.shape[2])

    def total(x, w):
        y = product(x, w, GROUP)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, w)
    return y, gradients


@pytest.mark.parametrize("implementation", ["blocks", "ragged", None])
def test_each_block_is_multiplied_with_the_matrix_of_its_group(x64, implementation):
    x, w = normal(jax.random.key(0), 6, 3, 5), normal(jax.random.key(1), 4, 5, 7)
    actual = value_and_gradients(lambda *args: grouped_matmul(*args, implementation=implementation), x, w)
    assert_close(actual, value_and_gradients(reference.grouped_matmul, x, w))
    assert not np.any(actual[1][1][1])


def test_a_program_takes_the_way_of_the_platform_that_it_is_compiled_for():
    """Both passes; what this process runs on does not matter."""

    def total(x, w):
        return jnp.sum(grouped_matmul(x, w, GROUP) ** 2)

    traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(jnp.ones((6, 3, 5)), jnp.ones((4, 5, 7)))
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops == {"cpu": 2, "cuda": 2, "tpu": 0}


def test_without_groups_block_c_is_of_group_c(x64):
    x, w = normal(jax.random.key(0), 4, 3, 5), normal(jax.random.key(1), 4, 5, 7)
    assert_close(grouped_matmul(x, w), reference.grouped_matmul(x, w, jnp.arange(4)))


def test_bfloat16_adds_up_gradients_in_float32():
    """Adding 256 blocks to a sum in bfloat16 would stop at 256 of one block's size."""
    x, w = jnp.ones((600, 1, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    product = lambda w: grouped_matmul(x, w, jnp.zeros(600, int), implementation="blocks")  # noqa: E731
    gradient = jax.grad(lambda w: product(w).astype(jnp.float32).sum())(w)
    assert gradient.dtype == jnp.bfloat16
    assert gradient.item() == 600


def test_an_unknown_implementation_is_an_error(unchecked):
    with pytest.raises(ValueError, match=r"implementation='pallas', expected None or one of \['blocks', 'ragged'\]"):
        grouped_matmul(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)), jnp.zeros(1, int), implementation="pallas")
