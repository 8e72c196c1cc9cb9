"""Monarch matrices against the dense ones that their index formulas give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m2
from m2 import reference
from tests.numerics import assert_close, normal

# Shapes (blocks, out, in) of the factors.
SHAPES = {
    "rectangular": ((3, 4, 5), (4, 2, 3)),
    "unequal blocks": ((3, 4, 5), (2, 7, 6)),
    "more strides than a piece is wide": ((2, 3, 4), (6, 2, 1)),
    "order 3": ((6, 2, 4), (4, 3, 3), (6, 4, 2)),
    "order 3, uneven": ((6, 4, 5), (8, 7, 3), (14, 3, 4)),
}
# Compiled once for each shape, rather than operation by operation.
to_dense = jax.jit(m2.monarch_to_dense)
project = jax.jit(m2.project_to_monarch, static_argnums=1, static_argnames="hidden")
every_shape = pytest.mark.parametrize("shapes", list(SHAPES.values()), ids=list(SHAPES))


def make_factors(shapes, dtype=None):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(normal(key, *shape, dtype=dtype) for key, shape in zip(keys, shapes, strict=True))


def make_input(shapes, dtype=None):
    return normal(jax.random.key(1), 2, 3, shapes[0][0] * shapes[0][2], dtype=dtype)


def value_and_gradients(op, *arguments):
    weight = normal(jax.random.key(9), *jax.eval_shape(op, *arguments).shape)

    def total(arguments):
        y = op(*arguments)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arguments)
    return y, gradients


def transposed(factors):
    return tuple(w.mT for w in factors)


def test_blockdiag_agrees_with_reference_in_value_and_every_gradient_in_float64(x64):
    x, w = normal(jax.random.key(0), 2, 5, 6), normal(jax.random.key(1), 3, 4, 2)
    y, gradients = value_and_gradients(m2.blockdiag_matmul, x, w)
    expected, expected_gradients = value_and_gradients(reference.blockdiag_matmul, x, w)
    assert y.shape == (2, 5, 12)
    assert_close(y, expected)
    assert_close(gradients, expected_gradients, gradient=True)


@every_shape
def test_agrees_with_reference_in_value_and_every_gradient_in_float64(x64, shapes):
    arguments = make_input(shapes), *make_factors(shapes)
    y, gradients = value_and_gradients(m2.monarch_matmul, *arguments)
    expected, expected_gradients = value_and_gradients(reference.monarch_matmul, *arguments)
    assert_close(y, expected)
    assert_close(gradients, expected_gradients, gradient=True)


@every_shape
def test_dense_is_the_matrix_of_the_index_formula_and_in_reverse_its_transpose(x64, shapes):
    factors = make_factors(shapes)
    dense = to_dense(*factors)
    assert_close(dense, jax.jit(reference.monarch_to_dense)(*factors))
    assert_close(jax.jit(lambda *w: m2.monarch_to_dense(*w, reverse=True))(*transposed(factors)), dense.T)


def test_order_2_in_so_many_loops(x64):
    w1, w2 = make_factors(SHAPES["unequal blocks"])
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    expected = np.zeros((l * s, k * p))
    for hidden in range(k * q):
        row, column = divmod(hidden, l)  # a viewed as (r, l)
        piece, within = divmod(hidden, q)  # a as (k, q)
        for out in range(s):
            for i in range(p):
                expected[out * l + column, piece * p + i] += float(w2[column, out, row] * w1[piece, within, i])
    assert r * l == k * q
    assert_close(m2.monarch_to_dense(w1, w2), expected)


def test_order_3_transforms_one_axis_after_the_other(x64):
    # Blocks that are all the same: the Kronecker product of the three of them.
    blocks = [normal(jax.random.key(i), out, into) for i, (out, into) in enumerate([(2, 3), (4, 2), (3, 5)])]
    a, b, c = blocks
    counts = 3 * 2, 3 * 3, 4 * 3  # of the axes not transformed yet times those that are
    w1, w2, w3 = (jnp.tile(block, (count, 1, 1)) for block, count in zip((c, b, a), counts, strict=True))
    assert_close(to_dense(w1, w2, w3), jnp.kron(a, jnp.kron(b, c)))


@pytest.mark.parametrize(("dtype", "name"), [("float32", "unequal blocks"), ("bfloat16", "order 3")])
def test_keeps_the_dtype_and_its_precision(dtype, name):
    shapes = SHAPES[name]
    arguments = make_input(shapes, dtype), *make_factors(shapes, dtype)
    exact = [x.astype(jnp.float32) for x in arguments]
    y, gradients = value_and_gradients(m2.monarch_matmul, *arguments)
    expected, expected_gradients = value_and_gradients(reference.monarch_matmul, *exact)
    assert y.dtype == dtype
    assert_close(y, expected)
    assert_close(gradients, expected_gradients, gradient=True)


def test_dtypes_promote_and_sums_are_at_least_float32():
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((1, 1, 4096), jnp.bfloat16)
    assert m2.blockdiag_matmul(x, w).item() == 4096  # a sum kept in bfloat16 stops at 256
    # XLA on a CPU adds up in float32 unasked.
    asked = [
        e.params["preferred_element_type"] for e in jax.make_jaxpr(m2.blockdiag_matmul)(x, w).eqns if "dot" in str(e)
    ]
    assert asked == [jnp.float32]
    assert m2.blockdiag_matmul(x, w.astype(jnp.float32)).dtype == jnp.float32
    assert m2.blockdiag_matmul(x, w.astype(jnp.complex64)).dtype == jnp.complex64


def test_costs_n_to_the_one_and_a_half():
    def flops(root):
        x, w = jnp.zeros((1, root**2)), jnp.zeros((root,) * 3)
        return jax.jit(m2.monarch_matmul).lower(x, w, w).compile().cost_analysis()["flops"]

    assert flops(16) == 4 * 16**3  # two factors, a multiplication and an addition each
    assert flops(32) == 8 * flops(16)


@pytest.mark.parametrize(
    ("shape", "n_blocks", "hidden"),
    [
        ((9, 9), 3, None),
        ((8, 6), (3, 4), None),
        ((6, 8), (2, 3), 12),  # rank 2 for each pair
        ((14, 15), (3, 2), 12),
        ((6, 8), (4, 2), 4),  # pairs of rank 1 and of rank 0
        ((6, 9), (3, 2), 24),  # a rank of 4, more than the 3 x 3 matrices have
    ],
)
def test_projection_of_a_monarch_matrix_is_itself(x64, shape, n_blocks, hidden):
    (m, n), (k, l) = shape, (n_blocks, n_blocks) if isinstance(n_blocks, int) else n_blocks
    between = hidden or k * l
    shapes = (k, between // k, n // k), (l, m // l, between // l)
    dense = to_dense(*make_factors(shapes))
    factors = project(dense, n_blocks, hidden=hidden)
    assert tuple(w.shape for w in factors) == shapes
    assert_close(to_dense(*factors), dense)
    assert_close(*(np.sum(np.square(w)) for w in factors))  # the root of the singular value on each


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "n_blocks", "hidden"), [((6, 9), (3, 2), 6), ((6, 8), (2, 2), 8)])
def test_projection_beats_alternating_least_squares(x64, shape, n_blocks, hidden):
    (m, n), (k, l) = shape, n_blocks
    dense = np.asarray(normal(jax.random.key(3), m, n))
    error = jnp.sum((m2.monarch_to_dense(*project(dense, n_blocks, hidden=hidden)) - dense) ** 2)
    found = min(alternate(dense, k, l, hidden, seed) for seed in range(3))
    assert float(error) == pytest.approx(found, rel=1e-6)
    assert float(error) > 0.01 * np.sum(dense**2)  # far from exact: there was something to find


def alternate(dense, k, l, hidden, seed, rounds=100):
    """Least squares in one factor, then in the other, over all entries at once: the error it arrives at."""
    (m, n), rng = dense.shape, np.random.default_rng(seed)
    first = reference.strided_to_dense(jnp.asarray(rng.standard_normal((k, hidden // k, n // k))), k)
    see_first = np.asarray(reference.strided_to_dense(jnp.ones((k, hidden // k, n // k)), k)) > 0
    see_second = np.asarray(reference.strided_to_dense(jnp.ones((l, m // l, hidden // l)), 1)) > 0
    first, second = np.array(first), np.zeros((m, hidden))
    for _ in range(rounds):
        for row, seen in enumerate(see_second):  # a row of the second factor sees only its hidden entries
            second[row, seen] = np.linalg.lstsq(first[seen].T, dense[row], rcond=None)[0]
        for column, seen in enumerate(see_first.T):
            first[seen, column] = np.linalg.lstsq(second[:, seen], dense[:, column], rcond=None)[0]
    return np.sum((second @ first - dense) ** 2)


def test_projection_takes_a_batch():
    dense = normal(jax.random.key(0), 2, 6, 8)
    together, alone = project(dense, (2, 3)), [project(W, (2, 3)) for W in dense]
    assert_close(together, tuple(jnp.stack(pair) for pair in zip(*alone, strict=True)))


@jax.jit
def invert(*factors):
    return m2.monarch_to_dense(*m2.monarch_inverse(*factors), reverse=True)


@pytest.mark.parametrize("shapes", [((3, 4, 4), (2, 6, 6)), ((6, 4, 4), (8, 3, 3), (12, 2, 2))])
def test_inverse_undoes_the_product_from_both_sides(x64, shapes):
    factors = make_factors(shapes)
    identity = np.eye(shapes[0][0] * shapes[0][2])
    dense, inverse = to_dense(*factors), invert(*factors)
    assert_close(dense @ inverse, identity)
    assert_close(inverse @ dense, identity)


@pytest.mark.parametrize("shapes", [((16, 128, 64), (64, 8, 32)), ((64, 8, 8),) * 3])
def test_initial_factors_keep_the_variance(shapes):
    factors = jax.jit(lambda key: m2.monarch_init(key, *shapes))(jax.random.key(0))
    for w, shape in zip(factors, shapes, strict=True):
        assert w.shape == shape
        assert float(jnp.var(w)) == pytest.approx(1 / shape[2], rel=0.05)
    y = jax.jit(m2.monarch_matmul)(normal(jax.random.key(1), 64, shapes[0][0] * shapes[0][2]), *factors)
    assert float(jnp.var(y)) == pytest.approx(1, rel=0.1)


ORDERS = pytest.mark.parametrize("sizes", [(3, 5), (2, 3, 4), (3, 2, 2, 5)])


@functools.partial(jax.jit, static_argnums=1, static_argnames="inverse")
def fourier(x, sizes, *, inverse=False):
    return m2.monarch_matmul(m2.digit_reversal(x, *sizes), *m2.dft_factors(*sizes, inverse=inverse))


@ORDERS
def test_the_fourier_transform_and_its_inverse_are_monarch_products(x64, sizes):
    n = int(np.prod(sizes))
    j = np.arange(n)
    dft = np.exp(-2j * np.pi * (j[:, None] * j % n) / n)
    # Rows of the identity in, columns of the matrix out; symmetric.
    assert np.abs(fourier(jnp.eye(n), sizes) - dft).max() < 1e-12
    assert np.abs(fourier(jnp.eye(n), sizes, inverse=True) - dft.conj() / n).max() < 1e-12


@ORDERS
def test_a_circulant_matrix_is_a_monarch_product_a_diagonal_and_another(x64, sizes):
    n = int(np.prod(sizes))
    column = normal(jax.random.key(0), n)
    j = np.arange(n)
    circulant = np.asarray(column)[(j[:, None] - j) % n]
    product = fourier(fourier(column, sizes) * fourier(jnp.eye(n), sizes), sizes, inverse=True)
    assert np.abs(product.T - circulant).max() < 1e-12


def test_the_inverse_factors_of_the_transform_are_its_conjugate_in_reverse(x64):
    sizes = 2, 3, 4
    factors = m2.dft_factors(*sizes)
    x = normal(jax.random.key(0), 24) + 0j
    back = m2.monarch_matmul(fourier(x, sizes), *m2.monarch_inverse(*factors), reverse=True)
    assert np.abs(m2.digit_reversal(back, *reversed(sizes)) - x).max() < 1e-12


def test_transforms_are_complex64_unless_wider_numbers_are_on():
    assert m2.dft_factors(2, 3)[0].dtype == jnp.complex64
    x = normal(jax.random.key(0), 1024)
    error = jnp.abs(fourier(x, (32, 32)) - jnp.fft.fft(x))
    assert float(error.max()) < 1e-6 * 1024**0.5 * float(jnp.abs(x).max())


def test_digit_reversal_reverses_the_axes():
    x = jnp.arange(24)
    assert m2.digit_reversal(x, 2, 3, 4)[1 * 12 + 2 * 4 + 3] == 3 * 6 + 2 * 2 + 1
    assert jnp.array_equal(m2.digit_reversal(m2.digit_reversal(x, 2, 3, 4), 4, 3, 2), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m2.blockdiag_matmul(jnp.ones((2, 5)), jnp.ones((2, 3, 3))), r"x has shape \(2, 5\), expected .* 6\)"),
        (
            lambda: m2.blockdiag_matmul(jnp.ones((2, 6)), jnp.ones((3, 3))),
            r"w has shape \(3, 3\), expected \(k, o, i\)",
        ),
        (
            lambda: m2.monarch_matmul(jnp.ones(6), jnp.ones((2, 3, 4)), jnp.ones((3, 2, 2))),
            r"x has shape \(6,\), expected \(\.\.\., 8\) for factors \(2, 3, 4\), \(3, 2, 2\)",
        ),
        (
            lambda: m2.monarch_matmul(jnp.ones(8), jnp.ones((2, 3, 4)), jnp.ones((3, 2, 3))),
            r"w2 has shape \(3, 2, 3\), expected 6 = blocks \* size, to fit w1",
        ),
        (
            lambda: m2.monarch_matmul(jnp.ones(8), *(jnp.ones((2, 4, 4)),) * 2, jnp.ones((1, 8, 8))),
            r"w2 has shape \(2, 4, 4\), expected a multiple of 8 blocks",
        ),
        (lambda: m2.monarch_matmul(jnp.ones(8), jnp.ones((2, 4)), jnp.ones((2, 4, 4))), r"w1 has shape \(2, 4\)"),
        (lambda: m2.monarch_to_dense(jnp.ones((2, 3, 4))), "factors are 1, expected at least 2"),
        (lambda: m2.monarch_inverse(jnp.ones((2, 3, 4)), jnp.ones((3, 2, 2))), r"w1 has .* expected square blocks: a"),
        (lambda: m2.project_to_monarch(jnp.ones((6, 8)), 4), r"n_blocks=4 for W of shape .* = \(6, 8\), expected"),
        (lambda: m2.project_to_monarch(jnp.ones((6, 8)), (2, 3), hidden=8), "hidden=8, expected a multiple of both"),
        (lambda: m2.monarch_init(jax.random.key(0), (2, 3, 4), (2, 2, 2)), r"w2 has shape \(2, 2, 2\), expected 6"),
        (lambda: m2.dft_factors(8), r"sizes=\(8,\), expected at least two"),
        (lambda: m2.dft_factors(8, 0), r"sizes=\(8, 0\), expected at least two, each at least 1"),
        (
            lambda: m2.digit_reversal(jnp.ones(8), 2, 3),
            r"x has shape \(8,\), expected \(\.\.\., 6\) for sizes=\(2, 3\)",
        ),
    ],
)
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradients_turn_nothing_around_twice():
    """Each gradient is one product a block: besides them, memory for input and cotangent with the blocks first."""
    x, w = jnp.ones((4, 128, 64)), jnp.ones((4, 16, 16))
    pull = jax.jit(lambda x, w, dy: jax.vjp(m2.blockdiag_matmul, x, w)[1](dy))
    temporary = pull.lower(x, w, x).compile().memory_analysis().temp_size_in_bytes
    assert temporary <= 2.1 * x.nbytes
