"""`jax.export` of whole models: one program for any batch, any length and three platforms, with its states."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from tests.numerics import assert_close

PLATFORMS = ["cpu", "cuda", "tpu"]
OPTIONS = {
    "attn": zoo.AttentionConfig(head_dim=8),
    "mamba2": ssm.Mamba2Config(head_dim=8, d_state=4),
    "m2": m2.M2Config(l_max=64),
    "moe": zoo.MoEConfig(n_experts=4, d_ff=16, capacity_factor=None),
}


def ids(b, length):
    return jnp.asarray(np.random.default_rng(length).integers(0, 32, (b, length)), jnp.int32)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


EXPERTS = pytest.param("mamba2/moe attn[window=16]/moe[capacity_factor=1.25]", marks=pytest.mark.slow)


@pytest.mark.parametrize("pattern", [EXPERTS, "m2 attn/mlp"])
def test_a_language_model_is_two_programs_that_any_batch_and_prompt_go_through(pattern, unchecked):
    model = zoo.CausalLM(
        zoo.CausalLMConfig(d_model=16, n_layers=2, vocab_size=32, pattern=pattern, **OPTIONS), rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(model)
    params, tree = jax.tree.flatten(params)

    def prompt(params, ids, mask):
        model = nnx.merge(graphdef, jax.tree.unflatten(tree, params))
        return model.extend(ids, model.init_state(ids.shape[0], 64), mask=mask, last_only=True)

    def step(params, ids, state):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, params)).extend(ids, state)

    b, length = jax.export.symbolic_shape("b, l", constraints=["l <= 64"])
    rows, mask = jax.ShapeDtypeStruct((b, length), jnp.int32), jax.ShapeDtypeStruct((b, length), bool)
    read = jax.export.export(jax.jit(prompt), platforms=PLATFORMS)(abstract(params), rows, mask)
    one, two = (jax.eval_shape(lambda n=n: model.init_state(n, 64)) for n in (1, 2))
    (b,) = jax.export.symbolic_shape("b")
    state = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct([b if m != n else m for m, n in zip(x.shape, y.shape, strict=True)], x.dtype),
        *(one, two),
    )
    go_on = jax.export.export(jax.jit(step), platforms=PLATFORMS)(
        abstract(params), jax.ShapeDtypeStruct((b, 1), jnp.int32), state
    )
    read, go_on = (jax.export.deserialize(program.serialize()) for program in (read, go_on))
    assert read.platforms == tuple(PLATFORMS)

    given = ids(2, 9), jnp.arange(9) >= jnp.array([[0], [3]])
    logits, state = read.call(params, *given)
    expected, expected_state = jax.jit(prompt)(params, *given)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    assert_close(floats((logits, state)), floats((expected, expected_state)))
    after = go_on.call(params, ids(2, 1), state), jax.jit(step)(params, ids(2, 1), expected_state)
    assert_close(*map(floats, after))


@pytest.mark.parametrize("pattern", ["attn/mlp", "m2/monarch"])
def test_an_encoder_takes_every_length_that_it_has_positions_for(pattern, unchecked):
    config = zoo.MaskedLMConfig(d_model=16, n_layers=1, vocab_size=32, max_len=64, pattern=pattern, **OPTIONS)
    graphdef, params = nnx.split(zoo.MaskedLM(config, rngs=nnx.Rngs(0)))
    params, tree = jax.tree.flatten(params)
    run = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, jax.tree.unflatten(tree, params))(ids, mask))
    b, length = jax.export.symbolic_shape("b, l", constraints=["l <= 64"])
    rows, mask = jax.ShapeDtypeStruct((b, length), jnp.int32), jax.ShapeDtypeStruct((b, length), bool)
    exported = jax.export.export(run, platforms=PLATFORMS)(abstract(params), rows, mask)
    given = ids(2, 9), jnp.arange(9) < jnp.array([[9], [7]])
    assert_close(exported.call(params, *given), run(params, *given))
    with pytest.raises(ValueError, match=r"l <= 64|64 - l|constraint"):
        exported.call(params, ids(1, 65), jnp.ones((1, 65), bool))
    b, length = jax.export.symbolic_shape("b, l")
    rows, mask = jax.ShapeDtypeStruct((b, length), jnp.int32), jax.ShapeDtypeStruct((b, length), bool)
    with pytest.raises(ValueError, match=r"length=l, a symbol without a bound, expected at most max_len=64"):
        jax.export.export(run)(abstract(params), rows, mask)


@pytest.mark.slow
def test_an_image_classifier_takes_any_batch(unchecked):
    config = zoo.ImageClassifierConfig(
        d_model=16, n_layers=2, image_size=16, patch_size=4, n_classes=3, class_token="none", pool="mean",
        pattern="m2[conv=2d] ss2d/mlp",
    )  # fmt: skip
    graphdef, params = nnx.split(zoo.ImageClassifier(config, rngs=nnx.Rngs(0)))
    params, tree = jax.tree.flatten(params)
    run = jax.jit(lambda params, images: nnx.merge(graphdef, jax.tree.unflatten(tree, params))(images))
    (b,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(run, platforms=PLATFORMS)(
        abstract(params), jax.ShapeDtypeStruct((b, 16, 16, 3), jnp.float32)
    )
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    assert_close(exported.call(params, images), run(params, images))
