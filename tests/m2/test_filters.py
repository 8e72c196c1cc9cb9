"""The Hyena filter: its taps from their formula, its options, what it says of itself to the optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
from m2.filters import decay_rates, position_features, times
from tests.numerics import assert_close, with_random_parameters

SMALL = {"order": 6, "emb_dim": 5}


def make(*, dtype="float64", bidirectional=False, l_max=12, channels=3, **options):
    config = m2.HyenaFilterConfig(**SMALL | options)
    build = lambda: m2.HyenaFilter(  # noqa: E731
        channels, config, l_max=l_max, bidirectional=bidirectional, param_dtype=dtype, rngs=nnx.Rngs(0)
    )
    return with_random_parameters(build)


def expected_taps(module, network, length):
    c = module.config
    h = np.asarray(module.z[...])[:length]
    for i, layer in enumerate(network):
        h = h @ np.asarray(layer.kernel[...]) + (0 if layer.bias is None else np.asarray(layer.bias[...]))
        if i < len(network) - 1:
            h = np.sin(c.w_mod * np.asarray(module.freq[...]) * h)
    if c.modulate:
        t = np.arange(length)[:, None] / (module.l_max - 1)
        slow, fast = np.log(c.decay_target) / c.slow_decay, np.log(c.decay_target) / c.fast_decay
        delta = slow + (fast - slow) * np.arange(module.channels) / (module.channels - 1)
        h = h * (np.exp(-t * np.abs(delta)) + c.shift)
    return (h / np.abs(h).sum(1, keepdims=True) if c.normalized else h).T


@pytest.mark.parametrize(
    "options",
    [{}, {"w_mod": 2.0, "n_inner": 0}, {"shift": 0.05, "normalized": True}, {"modulate": False}, {"linear": True}],
)
def test_taps_follow_the_formula(options, x64):
    module = make(**options)
    for length in (1, 5, 12):
        expected = jnp.asarray(expected_taps(module, module.implicit_filter, length))
        assert_close(module(length), expected)


def test_both_directions_are_one_program():
    def products(**options):
        graphdef, params = nnx.split(make(dtype="float32", **options))
        return str(jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(7))(params)).count("dot_general")

    assert products(bidirectional=True) == products() == 4


def test_the_second_half_holds_later_positions_from_its_end(x64):
    module = make(bidirectional=True)
    k = module(7)
    assert_close(k[:, :7], jnp.asarray(expected_taps(module, module.implicit_filter, 7)))
    assert_close(k[:, :6:-1], jnp.asarray(expected_taps(module, module.implicit_filter_rev, 7)))


def make_2d(*, dtype="float64", l_max=16, channels=3, **options):
    config = m2.HyenaFilterConfig(**SMALL | options)
    build = lambda: m2.HyenaFilter2D(channels, config, l_max=l_max, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    return with_random_parameters(build)


@pytest.mark.parametrize("options", [{}, {"shift": 0.05, "n_inner": 0, "w_mod": 2.0}, {"normalized": True}])
def test_over_an_image_taps_follow_the_formula(options, x64):
    module, grid = make_2d(**options), (2, 3)  # distances in sides of four places
    c, k = module.config, np.asarray(module(grid))
    assert k.shape == (3, 4, 6)
    expected = np.zeros_like(k)
    angle = lambda lag: 2 * np.pi * lag / 4 * np.array([1e-4, 1])  # noqa: E731
    features = lambda lag: [lag / 3, *np.cos(angle(lag)), *-np.sin(angle(lag))]  # noqa: E731
    slow, fast = np.log(c.decay_target) / c.slow_decay, np.log(c.decay_target) / c.fast_decay
    for i in range(-2, 2):
        for j in range(-3, 3):
            h = np.array(features(i) + features(j))
            for n, layer in enumerate(module.implicit_filter):
                h = h @ np.asarray(layer.kernel[...]) + (0 if layer.bias is None else np.asarray(layer.bias[...]))
                if n < len(module.implicit_filter) - 1:
                    h = np.sin(c.w_mod * np.asarray(module.freq[...]) * h)
            h = h * (np.exp((abs(i) + abs(j)) / 3 * np.linspace(slow, fast, 3)) + c.shift)
            expected[:, i, j] = h / np.abs(h).sum() if c.normalized else h
    assert_close(jnp.asarray(k), jnp.asarray(expected))


def test_the_filter_of_a_larger_image_has_that_of_a_smaller_one_in_its_middle():
    """A lag means the same whatever the image, so a model goes on to other sizes; each of them has a tap of its own."""
    module = make_2d(dtype="float32", modulate=False)
    small, large = (np.asarray(module(grid)) for grid in ((2, 3), (5, 4)))
    np.testing.assert_allclose(large[:, [[0], [1], [-2], [-1]], [0, 1, 2, -3, -2, -1]], small, rtol=1e-5, atol=1e-5)
    assert len({float(tap) for tap in large[0].ravel()}) == large[0].size


def test_features_are_time_cosines_and_sines():
    np.testing.assert_allclose(times(5), [0, 0.25, 0.5, 0.75, 1])
    z = position_features(8, 5)
    np.testing.assert_allclose(z[:, 0], np.arange(8) / 7)
    np.testing.assert_allclose(z[:, 2], np.cos(2 * np.pi * np.arange(8) / 8), atol=1e-12)
    np.testing.assert_allclose(z[:, 4], -np.sin(2 * np.pi * np.arange(8) / 8), atol=1e-12)
    np.testing.assert_allclose(position_features(8, 3)[:, 1:], np.tile([1, 0], (8, 1)), atol=1e-3)
    np.testing.assert_allclose(decay_rates(768, m2.HyenaFilterConfig())[[0, -1]], [-3.0701, -15.3506], atol=1e-4)


def test_tells_the_optimiser_what_it_needs_to_know():
    module = make(dtype="float32", lr_scale=0.5, features_lr_scale=0.1)
    assert module.z.get_metadata()["lr_scale"] == 0.1
    assert not module.z.get_metadata()["decay"]
    assert module.implicit_filter[0].kernel.get_metadata()["lr_scale"] == 0.5
    assert not module.implicit_filter[0].bias.get_metadata()["decay"]
    assert not module.bias.get_metadata()["decay"]
    assert isinstance(make(dtype="float32").freq, nnx.Param)
    assert not isinstance(make(dtype="float32", train_freq=False).freq, nnx.Param)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emb_dim": 4}, "emb_dim=4, expected an odd number, at least 3"),
        ({"order": 0}, "order=0, expected at least 1"),
        ({"fast_decay": 0.0}, "fast_decay=0.0, expected more than 0"),
        ({"decay_target": 1.0}, "decay_target=1.0, expected 0 < decay_target < 1"),
        ({"init": "zeros"}, "init='zeros', expected 'normal' or 'uniform'"),
    ],
)
def test_errors_name_the_option(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        m2.HyenaFilterConfig(**options)


def test_an_image_has_a_place():
    with pytest.raises(ValueError, match=r"grid=\(0, 3\), expected at least one row and one column"):
        make_2d(dtype="float32")((0, 3))
    with pytest.raises(ValueError, match="l_max=0, expected at least 1"):
        make_2d(dtype="float32", l_max=0)


def test_no_filter_is_longer_than_l_max():
    with pytest.raises(ValueError, match="length=13, expected 1 to l_max=12"):
        make(dtype="float32")(13)
