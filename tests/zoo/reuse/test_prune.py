"""Smaller models: what is not needed goes at no cost, the others make up for the rest, and what cannot go is said."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, jitted, with_random_parameters
from tests.zoo.reuse.models import IDS, OPTIONS, causal
from zoo.reuse.choose_units import Wanted, choose
from zoo.reuse.compensation import cost
from zoo.reuse.cut_units import without
from zoo.reuse.importance import Reader, block_influence, largest, least_costly

slow = pytest.mark.slow
BATCHES = [{"ids": jnp.asarray(np.random.default_rng(1).integers(0, 11, (16, 12)))}]


def output(model):
    run, params = jitted(model)
    return run(params, IDS)


def is_built_of_its_config(model):
    return nnx.split(zoo.CausalLM(model.config, rngs=nnx.Rngs(0)))[0] == nnx.split(model)[0]


@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        ("mamba2/mlp", 4),
        pytest.param("attn/monarch", 2, marks=slow),
        pytest.param("mamba", 16, marks=slow),
        pytest.param("mamba3/mlp", 4, marks=slow),
        pytest.param("linear_attn/mlp", 2, marks=slow),
    ],
)
def test_units_that_others_repeat_go_at_no_cost(pattern, heads):
    """What `grow` makes has every head and hidden channel twice."""
    large = zoo.grow(causal(pattern), d_model=16, rngs=nnx.Rngs(0))
    small = zoo.prune(large, BATCHES, d_ff=None if "/" not in pattern else 8, n_heads=heads)
    assert is_built_of_its_config(small)
    assert sum(x.size for x in params(small)) < 0.7 * sum(x.size for x in params(large))
    assert_close(output(small), output(large), tolerance=2e-4)
    if pattern == "mamba2/mlp":
        plain = zoo.prune(large, BATCHES, d_ff=8, n_heads=heads, compensate=False)
        assert float(jnp.abs(output(plain) - output(large)).max()) > 0.05


def params(model):
    return [param[...] for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("attn/monarch", {}),
        pytest.param("mamba2/mlp", {"mamba2": ssm.Mamba2Config(d_state=4, head_dim=4, rmsnorm=False)}, marks=slow),
        pytest.param("mamba mamba3", {}, marks=slow),
        pytest.param("linear_attn/moe", {"tie_embeddings": False}, marks=slow),
    ],
)
def test_channels_that_nothing_writes_go_at_no_cost(pattern, options):
    config = zoo.CausalLMConfig(pattern=pattern, n_layers=len(pattern.split()), **OPTIONS | options)
    model = with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    dead = np.arange(8) % 2 == 1
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        writes = path[-2] in ("out_proj", "o_proj", "down_proj", "wo") or path[-1] == "embedding"
        if writes:
            value = param[...]
            if path[-2] == "wo":  # blocks of two channels: one of each is dead
                value = value.at[:, 1].set(0) if value.ndim == 3 else jnp.where(dead, 0, value)
            elif value.shape[-1] == 8:
                value = jnp.where(dead, 0, value)
            owner = model
            for part in path[:-1]:
                owner = owner[part] if isinstance(part, int) else getattr(owner, part)
            setattr(owner, path[-1], param.replace(value))
    small = zoo.prune(model, BATCHES, d_model=4)
    assert small.config.d_model == 4
    assert is_built_of_its_config(small)
    assert_close(output(small), output(model), tolerance=2e-4)


@pytest.mark.parametrize("pattern", ["m2/monarch mamba", pytest.param("mamba2/mlp attn/moe mamba3", marks=slow)])
def test_what_is_left_makes_up_for_what_goes_in_every_map(pattern):
    model = causal(pattern)
    moments = zoo.calibrate(model, BATCHES)
    kept = choose(model, moments, Wanted(d_model=4, d_ff=4))
    assert is_built_of_its_config(without(model, moments, kept))
    again, plain = (without(model, moments, kept, compensate=c) for c in (True, False))
    before, better = ({p: x[...] for p, x in nnx.to_flat_state(nnx.state(m, nnx.Param))} for m in (model, again))
    cut, several = {p: x[...] for p, x in nnx.to_flat_state(nnx.state(plain, nnx.Param))}, 0
    for path in before:
        width = kept["d_model"]
        name = ".".join(map(str, path))
        if name in moments and before[path].ndim == 2 and before[path].shape[0] == 8 and "down_proj" not in name:
            outputs = np.arange(before[path].shape[1])
            if cut[path].shape[1] != len(outputs):
                continue

            def change(left, path=path, width=width):
                return before[path] - jnp.zeros_like(before[path]).at[width].set(left)

            costs = [float(cost(change(left), moments[name])) for left in (better[path], cut[path])]
            assert costs[0] <= costs[1] * (1 + 1e-5), name
            several += costs[0] < 0.99 * costs[1]
    assert several


def test_the_unit_that_another_repeats_is_found_and_its_twin_stays():
    draw = np.random.default_rng(0).standard_normal
    x, W = draw((200, 6)), draw((6, 3))
    x[:, 4] = 2 * x[:, 1]
    x[:, 2] = 0
    reader = Reader(W, x.T @ x / 200, np.arange(6), np.arange(6)[:, None])
    kept = set(least_costly([reader], 6, 4).tolist())
    assert 2 not in kept
    assert len(kept & {1, 4}) == 1
    halves = least_costly([reader], 6, 4, n_parts=2)
    assert (halves < 3).sum() == 2
    assert largest(np.array([3.0, 1, 2, 9, 8, 7]), 2, n_parts=2).tolist() == [0, 3]


@slow
def test_blocks_that_add_nothing_and_tokens_that_do_not_come_go():
    model = causal("mamba/mlp", scan_layers=True)
    large = zoo.grow(model, n_layers=4, rngs=nnx.Rngs(0))
    influence = block_influence(large, BATCHES)
    assert np.all(influence[:2] > 1e-3)
    assert np.all(np.abs(influence[2:]) < 1e-5)
    small = zoo.prune(large, BATCHES, n_layers=2)
    assert small.config.n_layers == 2
    assert_close(output(small), output(model), tolerance=1e-6)
    only = zoo.prune(model, BATCHES, n_layers=[1])
    assert np.array_equal(only.backbone.layers[0].mixer.A_log[...], model.backbone.layers[1].mixer.A_log[...])
    ids = [7, 3, 5, 0]
    few = zoo.prune(model, BATCHES, vocabulary=ids)
    assert few.config.vocab_size == 4
    assert_close(few(jnp.asarray([[0, 1, 2, 3]])), model(jnp.asarray([ids]))[..., jnp.asarray(ids)], tolerance=1e-6)


def test_what_cannot_be_made_smaller_is_said():
    model = causal("mamba2/mlp attn/monarch")
    for options, message in (
        ({"n_heads": 2}, "expected one for each kind of mixer: attn, mamba2"),
        ({"n_heads": {"m2": 2}}, "m2 is no mixer of the model"),
        ({"d_ff": 9}, r"9 of 8 units"),
        ({"d_ff": 6}, "6 units, expected a multiple of 4"),
        ({"n_layers": 3}, "n_layers=3, expected 1 to the model's 2"),
        ({"n_layers": [1, 0]}, "expected numbers of blocks, rising"),
        ({"vocabulary": [1, 1]}, "expected ids, each once"),
        ({"vocabulary": [11]}, "has the id 11, expected 0 to 10"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.prune(model, BATCHES, **options)
    with pytest.raises(ValueError, match=r"calibration=\(\), expected one batch at least"):
        zoo.prune(model, [], d_ff=4)
    with pytest.raises(ValueError, match="has no channel mixers"):
        zoo.prune(causal("mamba"), BATCHES, d_ff=4)
    grouped = zoo.CausalLMConfig(pattern="attn", n_layers=1, **OPTIONS | {"attn": zoo.AttentionConfig(4, 2, 2)})
    with pytest.raises(ValueError, match="3 units, expected a multiple of 2"):
        zoo.prune(zoo.CausalLM(grouped, rngs=nnx.Rngs(0)), BATCHES, n_heads=3)


def test_heads_of_two_mixers_side_by_side_go_at_no_cost():
    large = zoo.grow(causal("mamba2+attn"), d_model=16, rngs=nnx.Rngs(0))
    small = zoo.prune(large, BATCHES, n_heads={"attn": 2, "mamba2": 4})
    assert_close(output(small), output(large), tolerance=2e-4)


def test_all_tokens_in_another_order_are_all_that_changes():
    config = zoo.CausalLMConfig(**OPTIONS | {"vocab_size": 8}, pattern="-/mlp", n_layers=1)
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    turned = zoo.prune(model, BATCHES, vocabulary=[*reversed(range(8))])  # as many as there are, and as channels
    assert np.array_equal(turned.embedding.embedding[...], model.embedding.embedding[...][::-1])


def test_what_is_written_into_a_smaller_or_larger_model_stays_out_of_the_other():
    model = causal("-/mlp")
    before = np.asarray(model.embedding.embedding[...])
    for other in (
        zoo.grow(model, rngs=nnx.Rngs(0)),
        zoo.grow(model, n_layers=2, rngs=nnx.Rngs(0)),
        zoo.prune(model, BATCHES, d_ff=8),
        zoo.prune(model, BATCHES, n_layers=[0]),
    ):
        arrays = [value[...] for _, value in nnx.to_flat_state(nnx.state(other))]
        assert not {*map(id, arrays)} & {id(value[...]) for _, value in nnx.to_flat_state(nnx.state(model))}
    for other in (zoo.quantize(model), zoo.add_deltas(model, [{}]), zoo.merge_lora(model), zoo.dequantize(model)):
        other.embedding.embedding[...] = jnp.zeros_like(before)
    assert np.array_equal(model.embedding.embedding[...], before)
