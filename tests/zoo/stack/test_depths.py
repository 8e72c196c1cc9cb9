"""Blocks that some positions go through: what goes through is the block's row, all else is as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from tests.numerics import assert_close, jitted, normal, with_random_parameters
from zoo.stack.depths import size_of

CONFIG = zoo.BackboneConfig(
    d_model=8,
    n_layers=2,
    pattern="mamba/mlp:0.5",
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
    mamba2=ssm.Mamba2Config(d_state=4, head_dim=4),
    mamba3=ssm.Mamba3Config(d_state=4, head_dim=4),
    attn=zoo.AttentionConfig(n_heads=2),
    m2=m2.M2Config(l_max=32),
    monarch=m2.MonarchMLPConfig(d_ff=8, n_blocks=2),
    moe=zoo.MoEConfig(n_experts=2, top_k=1, d_ff=4),
    mlp=zoo.MLPConfig(d_ff=8),
    dtype="float64",
    param_dtype="float64",
)
WORDS = ["mamba/mlp", *(pytest.param(word, marks=pytest.mark.slow) for word in ("m2/monarch", "mamba2+attn", "mamba3"))]
WORDS += [pytest.param("attn/moe", marks=pytest.mark.slow), pytest.param("linear_attn", marks=pytest.mark.slow)]


def build(pattern=CONFIG.pattern, mod=None, **fields):
    config = dataclasses.replace(CONFIG, pattern=pattern, mod=zoo.MoDConfig(**(mod or {})), **fields)
    return with_random_parameters(lambda: zoo.Backbone(config, rngs=0))


def training():
    return nnx.Rngs(dropout=0)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("word", WORDS)
def test_a_fresh_router_of_capacity_1_changes_nothing(x64, word, causal):
    routed, x = build(f"{word}:1", mod={"gate": "tanh"}, causal=causal), normal(jax.random.key(0), 2, 7, 8)
    plain = build(word, causal=causal)
    routed.norm_f = plain.norm_f
    for one, other in zip(plain.layers, routed.layers, strict=True):
        for name in ("norm", "norm2", "mixer", "mlp"):
            setattr(other, name, getattr(one, name))
        other.router.score.kernel[...] = jnp.zeros((8, 1))
        if other.router.decision is not None:  # what is foretold is all of them, too
            other.router.hidden.kernel[...] = jnp.zeros((8, 32))
            other.router.decision.bias[...] = jnp.full(1, 100.0)
            other.router.decision.kernel[...] = jnp.zeros((32, 1))
    expected = plain(x)
    assert_close(routed(x, rngs=training()), expected)
    assert_close(routed(x), expected)


@pytest.mark.parametrize("weighs", ["block", pytest.param("symmetric", marks=pytest.mark.slow)])
def test_what_goes_through_is_a_row_of_its_own(x64, weighs):
    backbone, x = build(mod={"weighs": weighs}, n_layers=1, causal=False), normal(jax.random.key(0), 2, 9, 8)
    graphdef, params = nnx.split(backbone.layers[0])
    order = np.argsort(-np.asarray(backbone.layers[0].router.scores(x)), axis=1, kind="stable")

    def by_rows(params, x):
        block, rows = nnx.merge(graphdef, params), []
        for row, r, best in zip(x, block.router.scores(x), np.sort(order[:, :4], axis=1), strict=True):
            here = row[best][None]
            if weighs == "block":
                new = here + r[best][None, :, None] * (block.run_all(here)[0] - here)
                around = row
            else:
                mixed = block.mix(here, block.mixer)
                new = mixed + r[best][None, :, None] * block.mlp(block.norm2(mixed))
                around = row * r[:, None]
            rows.append(around.at[best].set(new[0]))
        return jnp.stack(rows)

    weight, outputs = normal(jax.random.key(1), 2, 9, 8), []
    for run in (lambda params, x: nnx.merge(graphdef, params)(x), by_rows):

        def total(params, x, run=run):
            y = run(params, x)
            return jnp.sum(weight * y), y

        outputs.append(jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x))
    assert_close(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_a_packed_document_keeps_what_it_keeps_alone(x64, word):
    backbone, x = build(f"{word}:0.5", causal=False), normal(jax.random.key(0), 1, 9, 8)
    segments, mask = jnp.array([[4, 4, 4, 4, 4, 7, 7, 7, 7]]), jnp.ones((1, 9), bool).at[0, 4].set(False)
    y = backbone(x, segment_ids=segments, mask=mask)
    assert_close(y[:, :4], backbone(x[:, :4]))
    assert_close(y[:, 5:], backbone(x[:, 5:]))


@pytest.mark.parametrize("word", [*WORDS, pytest.param("attn/mlp", marks=pytest.mark.slow)])
def test_steps_give_what_the_whole_does(x64, word):
    backbone, x = build(f"{word}:0.5"), normal(jax.random.key(0), 2, 9, 8)
    segments, mask = jnp.array([[0, 0, 0, 0, 0, 1, 1, 1, 1]] * 2), jnp.ones((2, 9), bool).at[0, 2].set(False)
    given = {"segment_ids": segments, "mask": mask}
    for block in backbone.layers:  # about half of them go through
        block.router.decision.bias[...] = jnp.zeros(1)
        block.router.decision.bias[...] = -jnp.median(block.router._logits(x))[None]
    assert 0 < int(backbone.layers[0].router.foretell(x, mask=mask).sum()) < 17
    whole, state, pieces = backbone(x, **given), backbone.init_state(2, 9), []
    extend, params = jitted(backbone, "extend")
    for piece in (slice(0, 3), slice(3, 4), slice(4, 8), slice(8, 9)):
        y, state = extend(params, x[:, piece], state, **{name: value[:, piece] for name, value in given.items()})
        pieces.append(y)
    assert_close(jnp.where(mask[..., None], jnp.concatenate(pieces, 1), 0), jnp.where(mask[..., None], whole, 0))


def test_a_causal_model_looks_ahead_in_training_alone(x64):
    backbone, x = build("mamba:0.5"), normal(jax.random.key(0), 1, 8, 8)
    later = x.at[:, 5:].set(normal(jax.random.key(1), 1, 3, 8) * 5)
    assert_close(backbone(later)[:, :5], backbone(x)[:, :5])
    assert jnp.any(backbone(later, rngs=training())[:, :5] != backbone(x, rngs=training())[:, :5])
    assert backbone.has_auxiliary_loss
    assert backbone.run(x)[1] > 0


@pytest.mark.slow
def test_only_what_may_be_left_out_is(x64):
    """And a block made for the fewest such positions gives the same as one made for whole rows."""
    options = {"decides": "top_k", "gate": "tanh", "weighs": "symmetric"}
    backbone, x = build("attn/mlp:0.25", mod=options, n_layers=1), normal(jax.random.key(0), 2, 10, 8)
    image = (jnp.arange(10) >= 2) & (jnp.arange(10) < 7) | jnp.array([[False], [True]]) & (jnp.arange(10) == 7)
    y = backbone(x, skippable=zoo.Skippable(image))
    assert size_of(0.25, 10, zoo.Skippable(image, 5)) == 6
    assert_close(backbone(x, skippable=zoo.Skippable(image, 5)), y)
    block = backbone.layers[0]
    kept = block.router.choose(x, skippable=image)
    assert kept.sum(axis=1).tolist() == [6, 5]
    assert bool(jnp.all(kept | image))
    here = x[:1, np.flatnonzero(kept[0])]
    through = backbone.norm_f(block.run_all(here, weight=1.0, positions=jnp.flatnonzero(kept[0])[None])[0])
    text = np.flatnonzero(~image[0])
    assert_close(y[:1, text], through[:, np.searchsorted(np.flatnonzero(kept[0]), text)])
    with pytest.raises(ValueError, match=r"skippable has shape \(2, 3\), expected that of rows, \(2, 10\)"):
        backbone(x, skippable=zoo.Skippable(jnp.ones((2, 3), bool)))


@pytest.mark.slow
def test_attention_turns_by_the_places_that_positions_had(x64):
    attention = with_random_parameters(lambda: zoo.Attention(8, CONFIG.attn, rngs=nnx.Rngs(0)))
    x, places = normal(jax.random.key(0), 1, 4, 8), jnp.array([[0, 3, 4, 9]])
    y = attention(x, positions=places)
    assert_close(attention(x, positions=places + 5), y)
    assert_close(attention(x, positions=jnp.arange(4)[None]), attention(x))
    # Of two positions alone, the one sees the other at a distance: those between are there, and blank to it.
    far = jnp.concatenate([x[:, :1], normal(jax.random.key(1), 1, 3, 8), x[:, 1:2]], 1)
    q, k, v, _ = attention._project(far, jnp.arange(5)[None])
    seen = jnp.array([0, 4])
    expected = attention._out(attention._attend(q[:, seen], k[:, seen], v[:, seen]))
    assert_close(attention(x[:, :2], positions=jnp.array([[0, 4]])), expected)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equal_blocks_run_in_a_loop_and_recomputed_all_the_same(x64, scan):
    backbone, x = build("mamba:0.5"), normal(jax.random.key(0), 2, 8, 8)
    changed = build("mamba:0.5", scan_layers=scan, remat=True, remat_positions=4)
    assert_close(changed.run(x, rngs=training()), backbone.run(x, rngs=training()))


def test_what_stands_for_a_whole_image_goes_through_every_block():
    shape = {"image_size": 8, "patch_size": 2, "channels": 1, "n_classes": 2, "attn": CONFIG.attn}
    config = zoo.ImageClassifierConfig(d_model=8, n_layers=1, pattern="attn:0.5", class_token="first", **shape)
    _, given = zoo.ImageClassifier(config, rngs=0)._embed(jnp.ones((1, 8, 8, 1)), None)
    assert given["skippable"].positions.tolist() == [[False, *[True] * 16]]
    assert size_of(0.5, 17, given["skippable"]) == 9


@pytest.mark.slow
def test_a_block_for_a_quarter_costs_a_quarter():
    x = jnp.ones((1, 64, 8))

    def cost(pattern):
        config = dataclasses.replace(CONFIG, pattern=pattern, d_model=8, dtype="float32", param_dtype="float32")
        run, params = jitted(zoo.Backbone(dataclasses.replace(config, causal=False), rngs=0))
        return run.lower(params, x).cost_analysis()["flops"]

    assert cost("attn/mlp:0.25") < 0.4 * cost("attn/mlp")
    model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
    routed = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32, pattern="mamba:0.25")
    head = 2 * 32 * 16
    ours, theirs = (zoo.models.flops.forward_flops(m, 64) - head for m in (routed, model))
    assert ours == pytest.approx(0.25 * (theirs + 2 * 2 * (16 + 16 * 32 + 32)))


@pytest.mark.slow
def test_is_saved_loaded_and_generates_as_any_model(tmp_path):
    options = {"pattern": "attn attn:0.5", "attn": {"n_heads": 2}}
    model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32, **options)
    zoo.save_pretrained(model, tmp_path)
    again = zoo.from_pretrained(tmp_path, kind=zoo.CausalLM)
    ids = jnp.array([[1, 2, 3]])
    assert again.config == model.config
    assert_close(again(ids), model(ids))
    tokens = zoo.generate(model, ids, 4)
    assert jnp.argmax(model(tokens[:, :-1])[0, 2:, :32], axis=-1).tolist() == tokens[0, 3:].tolist()
    for layout in ("official", "transformers"):
        with pytest.raises(ValueError, match=r"attn attn:0\.5"):
            zoo.save_pretrained(model, tmp_path / layout, layout=layout)


@pytest.mark.parametrize(
    ("pattern", "fields", "message"),
    [
        ("ss2d:0.5", {"causal": False}, "ss2d goes by the rows and columns of an image"),
        ("attn:0.5", {"norm_place": "post", "mod": {"weighs": "symmetric"}}, "expected norm_place='pre'"),
    ],
)
def test_what_cannot_do_without_positions(unchecked, pattern, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, pattern=pattern, **fields)
