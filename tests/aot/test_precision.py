"""What the compilers make of products of float32: float32, where an operation promised it."""

import re

import jax
import jax.numpy as jnp
import pytest

import ssm
import zoo
from experiments.aot.programs import compile_for

pytestmark = pytest.mark.aot
B, L, H, P, N = 1, 256, 2, 64, 64
OPERATIONS = {
    "ssd": (ssm.ssd, [(B, L, H, P), (B, L, H), (H,), (B, L, 1, N), (B, L, 1, N)]),
    "linear attention": (ssm.linear_attention, [(B, L, H, N), (B, L, 1, N), (B, L, 1, P), (B, L, H)]),
    "trapezoid": (ssm.trapezoid, [(B, L, 1, H, P), *[(B, L, 1, H, N)] * 2, *[(B, L, H)] * 3]),
    "attention": (lambda q, k, v: zoo.softmax_attention(q, k, v, causal=True), [(B, L, H, P)] * 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_of_float32_is_rounded_on_the_way(name, v5e):
    function, shapes = OPERATIONS[name]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def total(*arguments):
        return sum(jnp.sum(x) for x in jax.tree.leaves(function(*arguments)))

    text = compile_for(v5e, jax.grad(total, range(len(shapes))), *shapes).compiled.as_text()
    products = [line for line in text.splitlines() if re.search(r" (convolution|dot)\(", line)]
    assert products
    assert all("operand_precision={highest,highest}" in line for line in products)
    assert "bf16[" not in text
