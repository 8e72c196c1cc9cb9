"""Two directions of a causal mixer: the average of both, padded and packed, without a state."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, normal, with_random_parameters

D_MODEL, LENGTH = 8, 8


@pytest.fixture(scope="module")
def both():
    """The mixer in float64, its output with positions given, and that of each direction alone."""
    config = ssm.Mamba2Config(d_state=4, head_dim=4)

    def build():
        forward, backward = (ssm.Mamba2(D_MODEL, config, param_dtype=jnp.float64, rngs=nnx.Rngs(i)) for i in range(2))
        return ssm.Bidirectional(forward, backward)

    with jax.enable_x64(True):
        mixer = with_random_parameters(build)
    call = jax.jit(lambda x, mask, segment_ids: mixer(x, mask=mask, segment_ids=segment_ids))
    directions = [jax.jit(direction.__call__) for direction in (mixer.forward, mixer.backward)]
    return SimpleNamespace(mixer=mixer, plain=jax.jit(mixer.__call__), call=call, directions=directions)


def make_input(length=LENGTH):
    return normal(jax.random.key(1), 2, length, D_MODEL)


def test_is_the_average_of_a_forward_and_a_backward_mixer(x64, both):
    x = make_input()
    forward, backward = both.directions
    assert_close(both.plain(x), (forward(x) + backward(x[:, ::-1])[:, ::-1]) / 2)


def test_padding_and_packing_change_nothing(x64, both):
    x = make_input()
    there = np.array([[True] * 4 + [False] * 4, [False] * 4 + [True] * 4])
    alone = both.plain(x[:, :4]), both.plain(x[:, 4:])
    y = both.call(x, jnp.asarray(there), jnp.ones((2, LENGTH), int))
    assert_close((y[0, :4], y[1, 4:]), (alone[0][0], alone[1][1]))
    packed = both.call(x, jnp.ones((2, LENGTH), bool), jnp.asarray([[1, 1, 1, 1, 0, 0, 0, 0]] * 2))
    assert_close((packed[:, :4], packed[:, 4:]), alone)


def test_every_output_depends_on_every_input_of_its_row(x64, both):
    x = make_input()
    y = both.plain(x)
    for t in (0, 3, 7):
        other = np.array(x)
        other[1, t] += 1
        change = np.any(np.asarray(both.plain(other) != y), axis=-1)
        assert not np.any(change[0])
        assert np.all(change[1])


def test_has_no_state_to_go_on_from(both):
    assert ssm.Mamba2.causal
    assert not both.mixer.causal
    message = "a bidirectional mixer has no state: every output depends on the whole sequence"
    with pytest.raises(ValueError, match=message):
        both.mixer.init_state(2)
    with pytest.raises(ValueError, match=message):
        both.mixer.extend(make_input(1), None)
