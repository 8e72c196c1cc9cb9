"""What products are multiplied in: float32 is float32 on every platform, and what half precision loses is measured."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import m2
from m2.monarch_dft import GridDFT, MonarchDFT, spectral_product
from tests.numerics import normal, rms_ratio

ROW, IMAGE = (2, 40, 4), (2, 5, 6, 4)


def zeros(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


# An operation, and the shapes that it takes: those of the numbers that flow through, those of the parameters.
OPS = {
    "fft_conv": (m2.fft_conv, [ROW], [(4, 40)]),
    "fft_conv, short filter": (m2.fft_conv, [(2, 300, 4)], [(4, 8)]),
    "fft_conv2d": (m2.fft_conv2d, [IMAGE], [(4, 10, 12)]),
    "causal_monarch": (m2.causal_monarch, [ROW], [(4, 40), (7, 7), (7, 6, 6)]),
    "blockdiag_matmul": (m2.blockdiag_matmul, [(3, 8)], [(4, 3, 2)]),
    "monarch_matmul": (m2.monarch_matmul, [(3, 8)], [(4, 2, 2), (4, 3, 2)]),
    "extend_conv": (lambda u, k: m2.extend_conv(u, m2.init_conv_state(k, 2, u.dtype))[0], [ROW], [(4, 64)]),
}


def products(function, *shapes):
    """(dtype, precision) of each product of matrices in a function and its gradients, in the program for a TPU."""

    def pull(weights, *arguments):
        return jax.vjp(function, *arguments)[1](weights)

    y = jax.eval_shape(function, *shapes)
    text = jax.jit(pull).trace(y, *shapes).lower(lowering_platforms=("tpu",)).as_text()
    found = re.findall(r"dot_general .*?precision = \[(\w+), \w+\].*?: \(tensor<[\dx]*(\w+)>", text)
    assert len(found) == text.count("stablehlo.dot_general")
    return {(dtype, precision) for precision, dtype in found}


@pytest.mark.parametrize("name", OPS)
def test_float32_is_multiplied_as_float32_on_a_tpu(name):
    function, *shapes = OPS[name]
    found = products(function, *(zeros(*shape, dtype=jnp.float32) for group in shapes for shape in group))
    assert found == {("f32", "HIGHEST")}


@pytest.mark.parametrize("name", ["fft_conv", "fft_conv2d"])
def test_convolutions_of_half_precision_take_three_bfloat16_products(name):
    function, data, parameters = OPS[name]
    shapes = [zeros(*shape, dtype=jnp.bfloat16) for shape in data]
    found = products(function, *shapes, *(zeros(*shape, dtype=jnp.float32) for shape in parameters))
    assert found == {("f32", "HIGH")}


def test_filters_are_float32_and_layers_follow_the_configuration():
    made = m2.HyenaFilter(4, l_max=16, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(made)
    assert products(lambda state: nnx.merge(graphdef, state)(16), state) == {("f32", "HIGHEST")}
    for layer in (m2.BlockdiagLinear(8, 12, n_blocks=2, rngs=nnx.Rngs(0)), m2.MonarchLinear(8, 12, rngs=nnx.Rngs(0))):
        x = zeros(3, 8, dtype=jnp.float32)
        assert products(layer, x) == {("f32", "DEFAULT")}
        with jax.default_matmul_precision("highest"):
            assert products(layer, x) == {("f32", "HIGHEST")}


def in_bfloat16(passes):
    """`lax.dot_general` of float32 as a TPU computes it in one or in three passes."""
    product = lax.dot_general_p.bind

    def part(x):
        high = lax.reduce_precision(x, 8, 7)
        return high, lax.reduce_precision(x - high, 8, 7)

    def multiply(x, y, **how):
        (x_high, x_low), (y_high, y_low) = part(x), part(y)
        z = product(x_high, y_high, **how)
        return z if passes == 1 else z + (product(x_high, y_low, **how) + product(x_low, y_high, **how))

    return multiply


def replay(function, multiply, *arguments):
    """A function's value with another product of matrices."""

    def run(jaxpr, consts, *arguments):
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        read = lambda x: x.val if isinstance(x, jax.extend.core.Literal) else known[x]  # noqa: E731
        for e in jaxpr.eqns:
            values = [read(x) for x in e.invars]
            if e.primitive.name == "dot_general":
                out = [multiply(*values, **e.params)]
            elif e.primitive.name in ("jit", "pjit"):
                out = run(e.params["jaxpr"].jaxpr, e.params["jaxpr"].consts, *values)
            else:
                out = e.primitive.bind(*values, **e.params)
            known.update(
                zip(e.outvars, out if e.primitive.multiple_results or type(out) is list else [out], strict=True)
            )
        return [read(x) for x in jaxpr.outvars]

    closed = jax.make_jaxpr(function)(*arguments)
    return run(closed.jaxpr, closed.consts, *arguments)[0]


@pytest.mark.parametrize("shape", [(1, 1024, 3), (1, 9, 11, 3)])
def test_what_three_bfloat16_products_lose(shape):
    """One pass loses more than half of a unit in the eighth bit, where the result is cut; three lose 1e-5 in all."""
    dft = GridDFT(18, 22) if len(shape) == 4 else MonarchDFT(2048)
    out = shape[1:3] if len(shape) == 4 else shape[1]
    x, k = (normal(jax.random.key(i), *shape, dtype=jnp.float32) for i in range(2))

    def convolve(x, k):
        return dft.inverse(spectral_product(dft(x), dft(k)), out)

    sizes = (18, 22) if len(shape) == 4 else (2048,)
    axes = tuple(range(1, 1 + len(sizes)))
    spectra = [np.fft.fftn(np.asarray(x, np.float64), sizes, axes) for x in (x, k)]
    exact = np.fft.ifftn(spectra[0] * spectra[1], axes=axes).real[tuple(slice(size) for size in (None, *shape[1:-1]))]
    errors = {passes: rms_ratio(replay(convolve, in_bfloat16(passes), x, k), exact) for passes in (1, 3)}
    assert rms_ratio(convolve(x, k), exact) < 1e-6
    assert errors[3] < 2e-5
    assert errors[1] > 2**-9
