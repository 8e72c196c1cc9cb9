"""Products of float32 are float32's on every platform: read from the program that is made for a TPU."""

import jax
import jax.numpy as jnp
import pytest

import ssm
from tests.numerics import tpu_products

B, L, H, P, N = 1, 70, 2, 4, 3
SHAPES = {
    "selective_scan": [(B, L, H), (B, L, H), (H, N), (B, L, N), (B, L, N)],
    "ssd": [(B, L, H, P), (B, L, H), (H,), (B, L, 1, N), (B, L, 1, N)],
    "linear_attention": [(B, L, H, N), (B, L, 1, N), (B, L, 1, P), (B, L, H)],
    "trapezoid": [(B, L, 1, H, P), *[(B, L, 1, H, N)] * 2, *[(B, L, H)] * 3],
    "ssd_step": [(B, H, P, N), (B, H, P), (B, H), (H,), (B, 1, N), (B, 1, N)],
}
DECAYS = {
    "selective_scan": (1, 2),
    "ssd": (1, 2),
    "linear_attention": (3,),
    "trapezoid": (3, 4, 5),
    "ssd_step": (0, 2, 3),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_products_of_float32_are_exact_and_others_add_up_in_it(name, dtype):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32 if i in DECAYS[name] else dtype) for i, shape in enumerate(SHAPES[name])
    ]

    def total(*arguments):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(getattr(ssm, name)(*arguments)))

    found = tpu_products(jax.grad(total, range(len(arguments))), *arguments)
    assert found or name == "selective_scan"  # sums and a kernel, no products
    for precision, one, other, result in found:
        assert result == "f32", found
        assert precision == "HIGHEST" or {one, other} == {"bf16"}, found
    assert dtype == "float32" or name in ("selective_scan", "ssd_step") or any("bf16" in one for _, one, *_ in found)
