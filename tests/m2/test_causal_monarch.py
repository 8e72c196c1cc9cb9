"""The causal Monarch product against the dense basis matrix, the convolution it contains, and its degrees' promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m2
from m2 import reference
from tests.numerics import assert_close, normal

T, S = 3, 2  # N = 12: sequences of up to 6

causal_monarch = jax.jit(m2.causal_monarch)
dense_causal_monarch = jax.jit(reference.causal_monarch)


def make_inputs(length, *, t=T, s=S, b=2, d=2, noise=0.5):
    keys = jax.random.split(jax.random.key(length), 4)
    return {
        "u": normal(keys[0], b, length, d),
        "k": normal(keys[1], d, length),
        "l_coefficients": jnp.eye(t) + noise * normal(keys[2], t, t),
        "r_coefficients": jnp.eye(s) + noise * normal(keys[3], t, s, s),
    }


def completed(r_coefficients):
    """Monomials for the polynomials that only padding meets: (t, s, s) -> (t, 2s, 2s)."""
    t, s = r_coefficients.shape[:2]
    return jnp.tile(jnp.eye(2 * s), (t, 1, 1)).at[:, :s, :s].set(r_coefficients)


def expected(u, k, l_coefficients, r_coefficients):
    return reference.causal_monarch(u, k, jnp.triu(l_coefficients), completed(jnp.triu(r_coefficients)))


def value_and_gradients(op, inputs):
    weight = normal(jax.random.key(9), *inputs["u"].shape)

    def total(inputs):
        y = op(**inputs)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return y, gradients


def later_on_earlier(op, inputs):
    """The largest dependence of an output on a later input, over the largest of all."""
    jacobian = np.asarray(jax.jacobian(lambda u: op(**(inputs | {"u": u})))(inputs["u"]))  # b l d b l d
    length = jacobian.shape[1]
    later = np.arange(length) > np.arange(length)[:, None]
    return np.abs(np.moveaxis(jacobian, 4, 2)[:, later]).max() / np.abs(jacobian).max()


@pytest.mark.parametrize("length", [4, 6])
def test_agrees_with_the_dense_matrix_in_value_and_every_gradient_in_float64(x64, length):
    inputs = make_inputs(length)
    y, gradients = value_and_gradients(m2.causal_monarch, inputs)
    expected_y, expected_gradients = value_and_gradients(expected, inputs)
    assert_close(y, expected_y)
    assert_close(gradients, expected_gradients, gradient=True)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100])
def test_monomials_make_it_the_causal_convolution(x64, length):
    l_coefficients, r_coefficients = m2.causal_monarch_init(jax.random.key(0), length, noise=0.0, dtype=jnp.float64)
    inputs = make_inputs(length)
    lag = np.arange(length)[:, None] - np.arange(length)
    taps = jnp.where(lag >= 0, inputs["k"][:, lag], 0)  # d l l
    direct = jnp.einsum("dts,bsd->btd", taps, inputs["u"])
    assert_close(causal_monarch(inputs["u"], inputs["k"], l_coefficients, r_coefficients), direct)


def test_no_output_depends_on_a_later_input(x64):
    # Rounding: the FFT mixes all positions, T^-1 amplifies it by its condition number.
    assert later_on_earlier(causal_monarch, make_inputs(20, t=5, s=4, b=1, noise=0.1)) < 1e-14
    assert later_on_earlier(causal_monarch, make_inputs(6, b=1)) < 1e-13


def test_every_output_depends_on_every_earlier_input_unlike_a_convolution(x64):
    inputs = make_inputs(6, b=1, d=1)
    jacobian = jax.jacobian(lambda u: causal_monarch(**(inputs | {"u": u})))(inputs["u"])[0, :, 0, 0, :, 0]
    assert np.abs(jacobian[np.tril_indices(6)]).min() > 1e-3
    assert np.abs(np.diff(np.diag(jacobian))).max() < 1e-12 < np.abs(np.diff(np.diag(jacobian, -1))).max()


def test_the_dense_twin_is_causal_as_well(x64):
    inputs = make_inputs(6, b=1)
    triangular = [jnp.triu(inputs["l_coefficients"]), completed(jnp.triu(inputs["r_coefficients"]))]
    inputs |= dict(zip(("l_coefficients", "r_coefficients"), triangular, strict=True))
    assert later_on_earlier(dense_causal_monarch, inputs) < 1e-12


@pytest.mark.parametrize("broken", ["l_coefficients", "r_coefficients"])
def test_without_a_the_minimum_degree_it_is_not_causal(x64, broken):
    inputs = make_inputs(6, b=1)
    full = {"l_coefficients": inputs["l_coefficients"], "r_coefficients": completed(inputs["r_coefficients"])}
    inputs |= {name: w if name == broken else jnp.triu(w) for name, w in full.items()}
    assert later_on_earlier(dense_causal_monarch, inputs) > 1e-2


def test_without_b_room_for_the_product_it_is_not_causal(x64):
    inputs = make_inputs(6, b=1)
    inputs["l_coefficients"] = jnp.triu(inputs["l_coefficients"])
    # 1. Degrees up to N in the polynomials that hold input, triangular all the same.
    high = jnp.triu(jnp.eye(2 * S) + 0.5 * normal(jax.random.key(5), T, 2 * S, 2 * S))
    assert later_on_earlier(dense_causal_monarch, inputs | {"r_coefficients": high}) > 1e-2
    # 2. Input beyond N / 2, with monomials: the Fourier transform without padding.
    monomials = {"l_coefficients": jnp.eye(T), "r_coefficients": jnp.tile(jnp.eye(2 * S), (T, 1, 1))}
    long = make_inputs(2 * T * S, b=1) | monomials
    assert later_on_earlier(dense_causal_monarch, long) > 1e-2


def test_entries_below_the_diagonal_change_nothing_and_have_no_gradient(x64):
    inputs = make_inputs(6)
    y, gradients = value_and_gradients(m2.causal_monarch, inputs)
    names = "l_coefficients", "r_coefficients"
    assert_close(causal_monarch(**(inputs | {name: jnp.triu(inputs[name]) for name in names})), y)
    for name in names:
        assert not np.any(np.tril(gradients[name], -1))
        assert np.all(np.isfinite(gradients[name]))


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(x64):
    inputs = make_inputs(20, t=5, s=4)
    whole = causal_monarch(**inputs)
    for length in (1, 5, 7):
        cut = {"u": inputs["u"][:, :length], "k": inputs["k"][:, :length]}
        assert_close(causal_monarch(**(inputs | cut)), whole[:, :length])


def test_the_basis_at_the_roots_of_unity_is_a_monarch_matrix(x64):
    l_coefficients, r_coefficients = (make_inputs(6)[f"{x}_coefficients"] for x in "lr")
    factors = m2.causal_monarch_factors(l_coefficients, r_coefficients)
    columns = m2.monarch_matmul(m2.digit_reversal(jnp.eye(2 * T * S), T, 2 * S), *factors)
    basis = reference.basis_at_roots(jnp.triu(l_coefficients), completed(jnp.triu(r_coefficients)))
    assert np.abs(columns.T - basis).max() < 1e-12
    monomials = m2.causal_monarch_factors(jnp.eye(T), jnp.tile(jnp.eye(S), (T, 1, 1)))
    for w, dft in zip(monomials, m2.dft_factors(T, 2 * S), strict=True):
        assert np.abs(w - dft).max() < 1e-15


def test_it_is_the_papers_product_of_monarch_matrices(x64):
    inputs = make_inputs(6)
    factors = m2.causal_monarch_factors(inputs["l_coefficients"], inputs["r_coefficients"])

    def values(x):  # M x, positions last
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 6)])
        return m2.monarch_matmul(m2.digit_reversal(padded, T, 2 * S), *factors)

    product = values(inputs["k"]) * values(jnp.swapaxes(inputs["u"], 1, 2))
    back = m2.monarch_matmul(product, *m2.monarch_inverse(*factors), reverse=True)
    y = jnp.swapaxes(m2.digit_reversal(back, 2 * S, T), 1, 2)
    assert np.abs(y.imag).max() < 1e-12
    assert_close(y.real[:, :6], causal_monarch(**inputs))


@pytest.mark.parametrize("length", [1, 2, 16, 17, 100])
def test_initial_polynomials_hold_the_length_and_keep_the_stated_condition(x64, length):
    l_coefficients, r_coefficients = m2.causal_monarch_init(jax.random.key(0), length, noise=0.5, dtype=jnp.float64)
    t, s = r_coefficients.shape[:2]
    assert (t - 1) * s < length <= t * s
    assert t * (s - 1) < length
    # Column j of T holds the coefficients of q_j, Z^0 first: row e t + m.
    T_matrix = np.einsum("jm,jse->emsj", l_coefficients, r_coefficients).reshape(t * s, t * s)
    assert not np.any(np.triu(T_matrix, 1))
    rho = [float(jnp.abs(w).sum(-1).max() - 1) for w in (l_coefficients, r_coefficients)]
    assert max(rho) < 1
    assert np.linalg.norm(T_matrix, 1) <= (1 + rho[0]) * (1 + rho[1]) * (1 + 1e-12)
    assert np.linalg.norm(np.linalg.inv(T_matrix), 1) <= (1 + 1e-12) / ((1 - rho[0]) * (1 - rho[1]))


def test_matrix_products_grow_with_the_length_to_the_one_and_a_half():
    def flops(length):
        coefficients = m2.causal_monarch_init(jax.random.key(0), length)
        arguments = jnp.zeros((1, length, 8)), jnp.zeros((8, length)), *coefficients
        return causal_monarch.lower(*arguments).compile().cost_analysis()["flops"]

    assert 4 < flops(4096) / flops(1024) < 8.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeps_the_dtype_of_the_input_and_computes_in_at_least_float32(dtype):
    inputs = {name: x.astype(dtype) for name, x in make_inputs(100, t=10, s=10, noise=0.05).items()}
    y = causal_monarch(**inputs)
    assert y.dtype == dtype
    with jax.enable_x64(True):
        exact = causal_monarch(**{name: jnp.asarray(np.asarray(x), jnp.float64) for name, x in inputs.items()})
        # Nothing but the output is rounded to bfloat16.
        assert_close(y, exact, tolerance=2e-3 if dtype == "bfloat16" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": jnp.zeros((2, 7, 2))}, r"u has shape \(2, 7, 2\), expected \(b, l, d\) with l at most t s = 6"),
        ({"k": jnp.zeros((2, 5))}, r"k has shape \(2, 5\), expected \(d, l\) = \(2, 6\)"),
        ({"l_coefficients": jnp.zeros((3, 2))}, r"l_coefficients has shape \(3, 2\), expected \(t, t\)"),
        ({"r_coefficients": jnp.zeros((2, 2, 2))}, r"r_coefficients has shape \(2, 2, 2\), expected .* with t=3"),
    ],
)
def test_errors_name_the_argument(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        m2.causal_monarch(**(make_inputs(6) | change))


def test_an_empty_length_is_an_error(unchecked):
    with pytest.raises(ValueError, match="length=0, expected at least 1"):
        m2.causal_monarch_init(jax.random.key(0), 0)
