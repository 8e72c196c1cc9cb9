"""Positions that are not there: nothing that lies at them has a part in a value or a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
from m2.absent import blank
from tests.numerics import normal, with_random_parameters

MASK = jnp.asarray([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
CONFIG = m2.M2Config(l_max=8, filter=m2.HyenaFilterConfig(order=4), residual_long_conv=True, training_additions=True)


def make_mixer(**options):
    return with_random_parameters(lambda: m2.M2Mixer(4, CONFIG, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("way", ["causal", "both ways", "extend"])
def test_the_mixer_takes_no_notice_of_what_is_not_there(way):
    graphdef, params = nnx.split(make_mixer(causal=way != "both ways"))
    x = normal(jax.random.key(1), 2, 6, 4, dtype=jnp.float32)

    @jax.jit
    def run(params, x):
        def total(params, x):
            mixer, mask = nnx.merge(graphdef, params), MASK
            y = mixer.extend(x, mixer.init_state(2), mask=mask)[0] if way == "extend" else mixer(x, mask=mask)
            return jnp.sum(blank(MASK, y) ** 2)

        return jax.value_and_grad(total, argnums=(0, 1))(params, x)

    expected, *others = (run(params, jnp.where(MASK[..., None], x, junk)) for junk in (0, jnp.nan, jnp.inf))
    for actual in others:
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))


def test_the_long_convolution_takes_no_notice_nor_do_its_gates():
    u, one, other = (normal(jax.random.key(i), 2, 6, 3, dtype=jnp.float32) for i in range(3))
    k = normal(jax.random.key(4), 3, 6, dtype=jnp.float32)

    @jax.jit
    def run(u, one, other, k):
        def total(u, one, other, k):
            y = m2.fft_conv(u, k, input_gate=one, output_gate=other, mask=MASK)
            return jnp.sum(y**2)

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(u, one, other, k)

    filled = [[jnp.where(MASK[..., None], x, junk) for x in (u, one, other)] for junk in (0, jnp.nan)]
    jax.tree.map(np.testing.assert_array_equal, *(run(*inputs, k) for inputs in filled))


def test_a_gap_is_refused_where_the_mask_is_known(unchecked):
    gap, x = jnp.asarray([[1, 1, 1], [1, 0, 1]], bool), jnp.zeros((2, 3, 4))
    mixer = make_mixer()
    for call in (mixer, lambda x, mask: mixer.extend(x, mixer.init_state(2), mask=mask)):
        with pytest.raises(ValueError, match=r"mask\[1, 1\] is False between positions that are there"):
            call(x, mask=gap)
    jax.eval_shape(lambda x, mask: mixer(x, mask=mask), x, gap)
