"""Norms of each depth around a block that all share (WideNet): a stack of copies of the block is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, jitted, normal, with_random_parameters

CONFIG = zoo.BackboneConfig(
    d_model=8,
    n_layers=4,
    pattern="mamba/moe@a",
    share_norms=False,
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
    attn=zoo.AttentionConfig(n_heads=2),
    moe=zoo.MoEConfig(n_experts=2, top_k=1, d_ff=4),
    mlp=zoo.MLPConfig(d_ff=4),
    dtype="float64",
    param_dtype="float64",
)


def copied(shared):
    """A stack without sharing whose blocks are copies of the shared, with the norms of their depth."""
    words = [word._replace(shared=None) for word in shared.words]
    config = dataclasses.replace(shared.config, pattern=zoo.format_pattern(tuple(words)), share_norms=True)
    new = zoo.Backbone(config, rngs=0)
    own = dict(zip(shared.norms_at, shared.norms, strict=True))
    for i, layer in enumerate(new.layers):
        for part, value in nnx.iter_children(shared.blocks[i]):
            setattr(layer, part, nnx.merge(*jax.tree.map(lambda a: a, nnx.split(value))))
        for name in ("norm", "norm2"):
            if i in own and getattr(layer, name) is not None:
                setattr(layer, name, getattr(own[i], name))
    new.norm_f = shared.norm_f
    return new


PATTERNS = ["mamba/moe@a", pytest.param("attn/mlp@a mamba attn/mlp@a mamba@b", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_copies_in_value_loss_and_gradient(x64, pattern):
    config = dataclasses.replace(CONFIG, pattern=pattern)
    shared, x = with_random_parameters(lambda: zoo.Backbone(config, rngs=0)), normal(jax.random.key(0), 2, 6, 8)
    copies = copied(shared)

    def total(params, graphdef):
        y, loss = nnx.merge(graphdef, params).run(x)
        return jnp.sum(jnp.sin(y)) + loss, (y, loss)

    out = []
    for model in (shared, copies):
        graphdef, params = nnx.split(model)
        out.append(jax.jit(jax.grad(total, has_aux=True), static_argnums=1)(params, graphdef))
    (ours, value), (theirs, expected) = out
    assert_close(value, expected)
    at = [*range(4)] if pattern == "mamba/moe@a" else [0, 2]
    summed = jax.tree.map(lambda *a: sum(a), *(theirs["layers"][i]["mixer"] for i in at))
    assert_close(ours["layers"][0]["mixer"], summed)
    assert_close(ours["norms"][0]["norm"], theirs["layers"][at[1]]["norm"])
    assert_close(ours["layers"][0]["norm"], theirs["layers"][0]["norm"])


@pytest.mark.slow
def test_loops_recomputation_and_steps_have_the_norms_of_their_depth(x64):
    shared, x = with_random_parameters(lambda: zoo.Backbone(CONFIG, rngs=0)), normal(jax.random.key(0), 2, 6, 8)
    expected = copied(shared)(x)
    fields = {"scan_layers": True, "remat": True, "remat_rounds": True}
    looped = with_random_parameters(lambda: zoo.Backbone(dataclasses.replace(CONFIG, **fields), rngs=0))
    assert_close(looped(x), expected)
    extend, params = jitted(shared, "extend")
    first, state = extend(params, x[:, :5], shared.init_state(2))
    assert_close(jnp.concatenate([first, extend(params, x[:, 5:], state)[0]], 1), expected)


def test_it_is_saved_and_loaded(tmp_path):
    fields = {"pattern": "mamba/mlp@a", "share_norms": False}
    model = zoo.create("mamba-130m", rngs=0, d_model=8, n_layers=3, vocab_size=16, **fields)
    assert len(model.backbone.layers) == 1
    assert len(model.backbone.norms) == 2
    model.backbone.norms[1].norm.scale[...] = jnp.full(8, 3.0)
    zoo.save_pretrained(model, tmp_path)
    ids = jnp.array([[1, 2, 3]])
    assert_close(zoo.from_pretrained(tmp_path, kind=zoo.CausalLM)(ids), model(ids))


def test_nothing_is_shared():
    with pytest.raises(ValueError, match="share_norms=False with pattern='mamba', expected a shared block"):
        dataclasses.replace(CONFIG, pattern="mamba")
