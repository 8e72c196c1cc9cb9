"""A state that modalities change in turn: what is missing is skipped exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo

WIDTHS = {"image": 5, "text": 3, "age": 1}


@pytest.fixture(scope="module")
def fusion():
    return zoo.SequentialFusion(WIDTHS, {"class": 4, "cost": 1}, d_state=6, d_hidden=7, rngs=0)


def features(rows=3, seed=0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=(rows, width)), jnp.float32) for name, width in WIDTHS.items()}


def test_each_modality_changes_the_state_in_turn(fusion):
    given = features()
    fused = fusion(given)
    state = jnp.broadcast_to(fusion.initial[...], (3, 6))
    for i, name in enumerate(WIDTHS):
        step = fusion.steps[i]
        inside = jax.nn.relu(jnp.concatenate([state, given[name]], -1) @ step.fc1.kernel[...] + step.fc1.bias[...])
        state = inside @ step.fc2.kernel[...] + step.fc2.bias[...]
        np.testing.assert_allclose(fused.states[:, i + 1], state, rtol=1e-5, atol=1e-6)
    read = fused.outputs["class"]
    assert read.shape == (3, 4, 4)
    np.testing.assert_allclose(read[:, 3], fusion.heads[0](state), rtol=1e-5, atol=1e-6)


def test_a_row_without_a_modality_is_as_if_there_were_none_to_the_bit(fusion):
    given, absent = features(), jnp.array([True, False, True])
    nonsense = given | {"text": given["text"].at[1].set(jnp.nan)}
    fused = fusion(nonsense, {"text": absent})
    without = fusion({name: x for name, x in given.items() if name != "text"})
    whole = fusion(given)
    for row, expected in enumerate((whole, without, whole)):
        np.testing.assert_array_equal(fused.states[row], expected.states[row])
    assert fused.there.tolist() == [[True, True, True], [True, False, True], [True, True, True]]
    assert bool(jnp.isfinite(fused.change))


def test_nothing_is_learned_from_what_is_missing(fusion):
    given = features()
    there = {"text": jnp.array([True, False, True])}
    graphdef, params = nnx.split(fusion)

    def loss(params, given, there, rows):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(given, there).outputs["class"][rows]))

    broken = given | {"text": given["text"].at[1].set(jnp.nan)}
    rows = jnp.array([1])
    found, moved = jax.grad(loss, argnums=(0, 1))(params, broken, there, rows)
    without = {name: x for name, x in given.items() if name != "text"}
    expected, _ = jax.grad(loss, argnums=(0, 1))(params, without, {}, rows)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        # To a rounding: zeros of the other rows are summed in another order.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8, err_msg=jax.tree_util.keystr(path))
    assert not np.any(np.asarray(moved["text"]))
    assert all(not np.any(np.asarray(x)) for x in jax.tree.leaves(found["steps"][1]))


def test_modalities_come_in_any_order(fusion):
    given = features()
    turned = fusion(given, order=("text", "image"))
    alone = fusion({"text": given["text"]}, order=("text",))
    np.testing.assert_array_equal(turned.states[:, 1], alone.states[:, 1])
    assert turned.states.shape == (3, 3, 6)


def test_change_is_the_mean_square_of_what_is_there(fusion):
    fused = fusion(features(), {"age": jnp.array([False, True, True])})
    moves = np.diff(np.asarray(fused.states), axis=1)
    expected = np.mean(np.square(moves), axis=-1)[np.asarray(fused.there)].mean()
    np.testing.assert_allclose(fused.change, expected, rtol=1e-6)


def test_a_step_of_one_s_own_reads_features_of_any_shape():
    class Sum(nnx.Module):
        def __call__(self, state, x):
            return state + x["tokens"].sum(axis=1) * x["scale"][:, None]

    fusion = zoo.SequentialFusion({"own": Sum()}, {}, d_state=2, rngs=0)
    given = {"own": {"tokens": jnp.ones((2, 3, 2)), "scale": jnp.array([2.0, jnp.nan])}}
    fused = fusion(given, {"own": jnp.array([True, False])})
    np.testing.assert_allclose(fused.states[:, 1] - fused.states[:, 0], [[6, 6], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"sound": jnp.ones((1, 2))},), "features names 'sound', expected some of image, text, age"),
        (({"age": jnp.ones((1, 1))}, {"sound": jnp.ones(1, bool)}), "there names 'sound'"),
        (({},), "features={}"),
        (
            ({"text": jnp.ones((3, 3)), "age": jnp.ones((1, 1))},),
            r"features\['age'\] have shape \(1, 1\), expected 3 rows",
        ),
        (({"age": jnp.ones((3, 2))},), r"features\['age'\] have shape \(3, 2\), expected \(3, 1\)"),
        (
            ({"age": jnp.ones((3, 1))}, {"age": jnp.ones(2, bool)}),
            r"there\['age'\] is bool\[2\], expected .* of 3 rows",
        ),
    ],
)
def test_what_does_not_fit_is_named(fusion, arguments, message):
    with pytest.raises(ValueError, match=message):
        fusion(*arguments)


def test_an_order_with_one_twice_and_no_modality_are_named(fusion):
    with pytest.raises(ValueError, match="once at most"):
        fusion(features(), order=("age", "age"))
    with pytest.raises(ValueError, match="at least one modality"):
        zoo.SequentialFusion({}, {}, d_state=2, rngs=0)
