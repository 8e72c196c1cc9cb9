"""Zamba2's mixer in a stack: what is shared, packed documents, gradients, errors. Its numbers: test_published.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, jitted, with_random_parameters

CONFIG = zoo.CausalLMConfig(
    d_model=8,
    n_layers=4,
    pattern="mamba2 zamba2 zamba2[block=1] zamba2",
    vocab_size=13,
    mamba2=ssm.Mamba2Config(head_dim=4, d_state=4, chunk_size=3),
    zamba2=zoo.Zamba2Config(n_heads=2, rope=True, d_ff=6, adapter_rank=2, attention_adapter=True),
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 9)))


def make(**fields):
    config = dataclasses.replace(CONFIG, **{"dtype": "float64", "param_dtype": "float64"} | fields)
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


def test_depths_with_a_number_share_a_transformer(x64):
    model = make()
    assert len(model.backbone.shared) == 2
    call, params = jitted(model)
    before = call(params, IDS)
    params["backbone"]["shared"][0]["down_proj"]["kernel"].set_value(jnp.zeros((6, 8)))
    without = call(params, IDS)
    assert np.abs(without - before).max() > 1e-3
    for depth in (1, 3):  # both depths with number 0 got nothing from it any more
        params["backbone"]["layers"][depth]["mixer"]["linear"]["kernel"].set_value(jnp.zeros((8, 8)))
    assert_close(call(params, IDS), without)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other(x64):
    call, params = jitted(make())
    segment_ids = jnp.asarray([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    packed = call(params, IDS, None, segment_ids)
    for row, cut in ((0, 4), (1, 7)):
        for part in (slice(0, cut), slice(cut, 9)):
            assert_close(packed[row, part], call(params, IDS[row : row + 1, part])[0])


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["remat", "scan_layers"])
def test_gradients_are_those_of_the_plain_stack(x64, switch):
    plain, other = (make(pattern="mamba2 zamba2*2", n_layers=3, **{switch: own}) for own in (False, True))

    def gradients(model):
        graphdef, params = nnx.split(model)
        loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(IDS)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_close(jax.tree.leaves(gradients(other)), jax.tree.leaves(gradients(plain)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "zamba2+attn"}, "expected zamba2 alone in its block, causal, norms before it"),
        ({"norm_place": "post"}, "expected zamba2 alone in its block"),
        ({"zamba2": {"n_heads": 0}}, "n_heads=0, expected at least 1"),
        ({"zamba2": {"block": -1}}, "block=-1, expected at least 0"),
        ({"zamba2": {"activation": "tanh"}}, "unknown activation 'tanh'"),
        ({"zamba2": {"n_heads": 5}}, "n_heads=5 must divide 2 d_model = 16"),
    ],
)
def test_errors_name_the_option(unchecked, fields, message):
    def build():
        options = fields.get("zamba2")
        said = fields if options is None else {"zamba2": dataclasses.replace(CONFIG.zamba2, **options)}
        zoo.CausalLM(dataclasses.replace(CONFIG, **said), rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(build)
