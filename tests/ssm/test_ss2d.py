"""The two-dimensional selective scan: its formulas written out, its symmetries, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, normal, with_random_parameters

D_MODEL, GRID = 6, (3, 4)
OPTIONS = {"d_state": 3, "dt_rank": 2, "expand": 1.5}


def make(scan="cross", dtype="float64", **options):
    config = ssm.SS2DConfig(**OPTIONS | options, scan=scan)
    return with_random_parameters(lambda: ssm.SS2D(D_MODEL, config, param_dtype=dtype, rngs=nnx.Rngs(0)))


def compiled(mixer, grid=GRID):
    graphdef, params = nnx.split(mixer)
    return jax.jit(lambda x, params=params: nnx.merge(graphdef, params)(x, grid=grid))


def make_input(b=2):
    return normal(jax.random.key(1), b, GRID[0] * GRID[1], D_MODEL)


def silu(x):
    return x / (1 + np.exp(-x))


def scanned(direction, u):
    """The selective scan of one sequence, position by position."""
    low_rank, B, C = np.split(u @ np.asarray(direction.x_proj.kernel[...]), [2, 5], axis=1)
    bias = np.asarray(direction.dt_proj.bias[...])
    delta = np.log1p(np.exp(low_rank @ np.asarray(direction.dt_proj.kernel[...]) + bias))
    A, D = -np.exp(np.asarray(direction.A_log[...])), np.asarray(direction.D[...])
    h, y = np.zeros(A.shape), []
    for t in range(len(u)):
        h = np.exp(delta[t][:, None] * A) * h + delta[t][:, None] * B[t] * u[t][:, None]
        y.append(h @ C[t] + D * u[t])
    return np.stack(y)


def test_equals_its_formulas_written_out(x64):
    """Four orders: by rows, by columns, and both back."""
    mixer, inputs = make(), make_input()
    kernel, expected = np.asarray(mixer.conv2d.kernel[...])[:, :, 0], []
    for image in np.asarray(inputs):
        x = (image @ np.asarray(mixer.in_proj.kernel[...])).reshape(*GRID, -1)
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        u = silu(sum(padded[i : i + GRID[0], j : j + GRID[1]] * kernel[i, j] for i in range(3) for j in range(3)))
        y = np.zeros_like(u)
        by_rows, by_columns = u.reshape(-1, u.shape[-1]), u.swapaxes(0, 1).reshape(-1, u.shape[-1])
        rows, columns, rows_back, columns_back = mixer.directions
        y += scanned(rows, by_rows).reshape(u.shape)
        y += scanned(columns, by_columns).reshape(GRID[1], GRID[0], -1).swapaxes(0, 1)
        y += scanned(rows_back, by_rows[::-1])[::-1].reshape(u.shape)
        y += scanned(columns_back, by_columns[::-1])[::-1].reshape(GRID[1], GRID[0], -1).swapaxes(0, 1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        y = y * np.asarray(mixer.norm.scale[...]) + np.asarray(mixer.norm.bias[...])
        expected.append(y.reshape(len(image), -1) @ np.asarray(mixer.out_proj.kernel[...]))
    assert_close(compiled(mixer)(inputs), jnp.asarray(np.stack(expected)))


def test_a_transposed_image_gives_the_transposed_output_where_directions_are_swapped(x64):
    mixer, x = make(), make_input()
    turned = make()
    for i, j in enumerate((1, 0, 3, 2)):
        nnx.update(turned.directions[i], nnx.state(mixer.directions[j]))
    turned.conv2d.kernel[...] = mixer.conv2d.kernel[...].swapaxes(0, 1)
    transpose = lambda a, grid: a.reshape(2, *grid, -1).swapaxes(1, 2).reshape(a.shape)  # noqa: E731
    expected = transpose(compiled(mixer)(x), GRID)
    assert_close(compiled(turned, GRID[::-1])(transpose(x, GRID)), expected)


@pytest.mark.parametrize(
    ("scan", "orders", "blind"), [("raster", 1, True), ("bidirectional", 2, False), ("hilbert", 2, False)]
)
def test_each_order_has_a_state_space_and_sees_what_it_reads_before(scan, orders, blind):
    mixer, x = make(scan, "float32"), make_input().astype(jnp.float32)
    assert len(mixer.directions) == orders
    call = compiled(mixer)
    change = np.abs(call(x.at[:, -1].add(1.0)) - call(x)).max(axis=(0, 2))
    # A change in the last corner reaches the first one but for a scan that only goes there.
    assert (change[0] == 0) == blind


def test_bfloat16_is_near_float32():
    mixer, x = make(dtype="float32"), make_input().astype(jnp.float32)
    half = ssm.SS2D(D_MODEL, mixer.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(mixer))
    y = compiled(half)(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), compiled(mixer)(x), tolerance=5e-2)  # projections, a convolution and a scan


def test_errors(unchecked):
    mixer, x = make(dtype="float32"), jnp.zeros((1, 12, D_MODEL))
    with pytest.raises(ValueError, match=r"grid=\(3, 5\) of 15 places, expected 12, the length of x"):
        mixer(x, grid=(3, 5))
    with pytest.raises(ValueError, match="reads whole images, expected neither mask nor segment_ids"):
        mixer(x, grid=GRID, mask=jnp.ones((1, 12), bool))
    with pytest.raises(ValueError, match="causal=True: the mixer reads an image from every side"):
        ssm.SS2D(D_MODEL, causal=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kind='zigzag', expected one of 'raster'"):
        ssm.SS2DConfig(scan="zigzag")
    for act in (lambda: mixer.init_state(1), lambda: mixer.extend(x, None)):
        with pytest.raises(ValueError, match="a bidirectional mixer has no state"):
            act()
