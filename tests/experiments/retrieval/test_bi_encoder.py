"""The loss of a batch of queries and documents: the same in mini-batches, in less memory, and blind to empty rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.loop.train import split_model
from experiments.retrieval.bi_encoder import Objective, embed_rows, retrieval_loss
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from tests.numerics import assert_close, with_random_parameters

B, K, L = 5, 3, 12
OBJECTIVES = {
    "in-batch": Objective(symmetric=True),
    "orthogonal": Objective(loss="orthogonal"),
    "prototype": Objective(loss="prototype", teacher="t"),
    "margin-mse": Objective(loss="margin-mse", teacher="t", score="dot"),
}


def make_model(**fields):
    config = {"d_model": 16, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": 50, "norm_place": "pre"} | fields
    config |= {"norm_eps": 1e-6, "attn": zoo.AttentionConfig(head_dim=8), "mlp": zoo.MLPConfig(d_ff=32)}
    config |= {"m2": M2Config(l_max=L, filter=HyenaFilterConfig(order=8)), "monarch": MonarchMLPConfig()}
    config = {"n_labels": 0, "pool": "mean", "pooler": False} | config
    return with_random_parameters(
        lambda: zoo.SequenceClassifier(zoo.SequenceClassifierConfig(**config), rngs=nnx.Rngs(0))
    )


def make_batch(b=B, k=K, width=16):
    rng = np.random.default_rng(0)

    def rows(n, length):
        mask = np.arange(length) < rng.integers(3, length + 1, n)[:, None]
        return np.where(mask, rng.integers(1, 50, (n, length)), 0).astype(np.int32), mask

    q_tokens, q_mask = rows(b, L // 2)
    d_tokens, d_mask = rows(b * k, L)
    ids = np.arange(b * k, dtype=np.int32).reshape(b, k)
    batch = {
        **{"q_tokens": q_tokens, "q_mask": q_mask, "d_tokens": d_tokens, "d_mask": d_mask, "d_ids": ids},
        "answers": np.concatenate([ids[:, :1], np.roll(ids[:, :1], 1, axis=0)], axis=1),
        "t_queries": rng.normal(size=(b, width)),
        "t_documents": rng.normal(size=(b, k, width)),
    }
    batch |= {name: batch[name].reshape(b, k, L) for name in ("d_tokens", "d_mask")}
    return jax.tree.map(jnp.asarray, batch)


def value_and_gradient(model, batch, objective, key=None):
    graphdef, params, rest = split_model(model)

    def mean(params):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        loss = retrieval_loss(nnx.merge(graphdef, params, rest), batch, rngs, objective=objective)
        return loss.total / loss.weight

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "in-batch" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_mini_batches_give_the_loss_and_every_gradient_of_the_whole_batch(name, x64):
    # In float64: some gradients all but cancel, and float32 then leaves 1e-5 of them to the order of the sums.
    model, batch, objective = make_model(dtype="float64", param_dtype="float64"), make_batch(), OBJECTIVES[name]
    value, gradient = value_and_gradient(model, batch, objective)
    # 4 divides neither 5 queries nor 15 documents.
    cached = value_and_gradient(model, batch, dataclasses.replace(objective, mini_batch=4))
    assert_close(cached, (value, gradient))


@pytest.mark.slow
def test_mini_batches_give_the_same_with_dropout_as_one_after_the_other_without_any_cache():
    model, tokens = make_model(dropout=0.3, embedding_dropout=0.2), make_batch()["q_tokens"]
    mask, key, (graphdef, params, rest) = tokens > 0, jax.random.key(3), split_model(model)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, 16)), jnp.float32)

    def cached(params):
        vectors, _ = embed_rows(nnx.merge(graphdef, params, rest), tokens, mask, nnx.Rngs(dropout=key), 2)
        return jnp.sum(jnp.sin(vectors) * weights)

    def plain(params):
        model, parts = nnx.merge(graphdef, params, rest), 3
        padded = [jnp.pad(x, ((0, 1), (0, 0))) for x in (tokens, mask)]
        keys = jax.random.split(nnx.Rngs(dropout=key).dropout(), parts)
        vectors = [model.embed(*(x[p::parts] for x in padded), rngs=nnx.Rngs(dropout=keys[p])) for p in range(parts)]
        return jnp.sum(jnp.sin(jnp.stack(vectors, axis=1).reshape(6, 16)[:B]) * weights)

    (value, gradient), expected = (jax.jit(jax.value_and_grad(f))(params) for f in (cached, plain))
    assert_close((value, gradient), expected)
    assert abs(float(value) - float(jnp.sum(jnp.sin(model.embed(tokens, mask)) * weights))) > 1e-3


@pytest.mark.slow
def test_a_mixture_of_experts_is_trained_with_its_balance():
    model, batch = make_model(pattern="attn/moe[n_experts=3,d_ff=8,balance_weight=0.5]"), make_batch()
    of_queries = model.run(batch["q_tokens"], batch["q_mask"])[1]
    of_documents = model.run(batch["d_tokens"].reshape(B * K, L), batch["d_mask"].reshape(B * K, L))[1]
    loss = retrieval_loss(model, batch, None, objective=OBJECTIVES["in-batch"])
    assert float(loss.auxiliary) == pytest.approx(float(of_queries + of_documents) / 2, rel=1e-5)
    in_parts = retrieval_loss(model, batch, None, objective=Objective(symmetric=True, mini_batch=4))
    assert float(in_parts.total) == pytest.approx(float(loss.total), rel=1e-5)
    assert float(in_parts.auxiliary) > 0.4  # of mini-batches: not the same, since a balance is no sum over rows
    assert retrieval_loss(make_model(), batch, None, objective=OBJECTIVES["in-batch"]).auxiliary is None


@pytest.mark.slow
def test_mini_batches_keep_the_activations_of_one():
    model, batch = make_model(), make_batch(b=32, k=2)
    graphdef, params, rest = split_model(model)

    def memory(mini_batch):
        def total(params):
            objective = Objective(mini_batch=mini_batch)
            return retrieval_loss(nnx.merge(graphdef, params, rest), batch, None, objective=objective).total

        return jax.jit(jax.value_and_grad(total)).lower(params).compile().memory_analysis().temp_size_in_bytes

    whole, small = memory(None), memory(4)
    assert small < whole / 3, (small, whole)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("in-batch", "attn/mlp"),
        pytest.param("orthogonal", "m2/monarch", marks=pytest.mark.slow),
        pytest.param("prototype", "attn/mlp", marks=pytest.mark.slow),
        pytest.param("margin-mse", "attn/mlp", marks=pytest.mark.slow),
    ],
)
def test_empty_rows_change_neither_the_loss_nor_any_gradient(name, pattern, x64):
    model = make_model(pattern=pattern, pool="attention", dtype="float64", param_dtype="float64")
    batch, objective = make_batch(), OBJECTIVES[name]
    value, gradient = value_and_gradient(model, batch, objective)
    empty = {
        name: jnp.concatenate([x, jnp.full((2, *x.shape[1:]), -1 if name in ("d_ids", "answers") else 0, x.dtype)])
        for name, x in batch.items()
    }
    padded = value_and_gradient(model, empty, objective)
    assert_close(padded, (value, gradient))


@pytest.mark.slow
def test_a_missing_negative_weighs_nothing():
    model, batch = make_model(), make_batch()
    batch["d_ids"] = batch["d_ids"].at[:, 2].set(-1)
    fewer = {name: x[:, :2] if name[:2] in ("d_", "t_") and x.ndim > 1 else x for name, x in batch.items()}
    fewer["t_queries"] = batch["t_queries"]
    for objective in OBJECTIVES.values():
        function = jax.jit(lambda batch, objective=objective: retrieval_loss(model, batch, None, objective=objective))
        assert_close(tuple(function(batch)), tuple(function(fewer)))


@pytest.mark.slow
def test_prototype_maps_vectors_to_the_teachers_width():
    model, batch = make_model(n_labels=24), make_batch(width=24)
    loss = retrieval_loss(model, batch, None, objective=OBJECTIVES["prototype"])
    vectors = model.classifier(model.embed(batch["q_tokens"], batch["q_mask"]))
    cosine = jnp.sum(vectors * batch["t_queries"], 1) / jnp.linalg.norm(vectors, axis=1)
    queries = jnp.sum(1 - cosine / jnp.linalg.norm(batch["t_queries"], axis=1))
    assert float(loss.weight) == B * (1 + K)
    assert 0 < float(queries) < float(loss.total)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "prototype"}, "--teacher None with --loss prototype, expected a model to learn from"),
        ({"teacher": "x"}, "--teacher x with --loss in-batch, expected none"),
        ({"loss": "orthogonal", "score": "dot"}, "--score dot with --loss orthogonal"),
        ({"negatives": -1}, "--negatives -1 with --loss in-batch, expected more"),
        ({"loss": "margin-mse", "teacher": "x", "negatives": 0}, "--negatives 0 with --loss margin-mse, expected more"),
        ({"mini_batch": 0}, "--mini-batch 0, expected at least 1"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)
