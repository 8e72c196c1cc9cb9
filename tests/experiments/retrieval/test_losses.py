"""Each loss against its formula in numpy and float64; what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import losses
from tests.numerics import assert_close

B, K, D = 5, 3, 7
RNG = np.random.default_rng(0)
QUERIES, DOCUMENTS = RNG.normal(size=(B, D)), RNG.normal(size=(B, K, D))
IDS = np.arange(B * K).reshape(B, K)
NONE = np.full((B, 1), -1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax_loss(scores, right):
    """-log softmax of one entry of a row of numbers."""
    return np.log(np.sum(np.exp(scores))) - scores[right]


def arrays(*values):
    return [jnp.asarray(value) for value in values]


@pytest.mark.parametrize(("score", "scale"), [("cosine", 20.0), ("dot", 1.0)])
def test_in_batch_is_the_cross_entropy_over_all_documents(score, scale):
    q, d = (unit(QUERIES), unit(DOCUMENTS)) if score == "cosine" else (QUERIES, DOCUMENTS)
    scores = scale * q @ d.reshape(B * K, D).T
    expected = [softmax_loss(scores[i], i * K) for i in range(B)]
    actual = losses.in_batch(*arrays(QUERIES, DOCUMENTS, IDS, IDS[:, :1]), score=score, scale=scale)
    assert_close(actual, np.array(expected))


def test_symmetric_adds_the_queries_from_the_answers_side():
    scores = 20 * unit(QUERIES) @ unit(DOCUMENTS).reshape(B * K, D).T
    there = [softmax_loss(scores[i], i * K) for i in range(B)]
    back = [softmax_loss(scores[:, i * K], i) for i in range(B)]
    actual = losses.in_batch(*arrays(QUERIES, DOCUMENTS, IDS, IDS[:, :1]), symmetric=True)
    assert_close(actual, (np.array(there) + np.array(back)) / 2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_answer_of_another_row_is_no_negative(symmetric):
    ids, answers = IDS.copy(), np.concatenate([IDS[:, :1], NONE], axis=1)
    answers[0, 1] = ids[1, 0]  # query 0 is answered by the answer of query 1 as well
    ids[3, 1] = ids[2, 0]  # the answer of query 2 is among the negatives of query 3
    scores = 20 * unit(QUERIES) @ unit(DOCUMENTS).reshape(B * K, D).T
    expected = []
    for i in range(B):
        left_out = {0: [1 * K], 2: [3 * K + 1]}.get(i, [])
        kept = [c for c in range(B * K) if c not in left_out]
        value = softmax_loss(scores[i, kept], kept.index(i * K))
        if symmetric:
            kept = [j for j in range(B) if (i, j) != (1, 0)]
            value = (value + softmax_loss(scores[kept, i * K], kept.index(i))) / 2
        expected.append(value)
    actual = losses.in_batch(*arrays(QUERIES, DOCUMENTS, ids, answers), symmetric=symmetric)
    assert_close(actual, np.array(expected))


@pytest.mark.parametrize("symmetric", [False, True])
def test_empty_rows_and_missing_documents_change_nothing(symmetric):
    whole = losses.in_batch(*arrays(QUERIES[:3], DOCUMENTS[:3], IDS[:3], IDS[:3, :1]), symmetric=symmetric)
    ids, queries, documents = IDS.copy(), QUERIES.copy(), DOCUMENTS.copy()
    ids[3:], queries[3:], documents[3:] = -1, 0, 0
    padded = losses.in_batch(*arrays(queries, documents, ids, ids[:, :1]), symmetric=symmetric)
    assert_close(padded[:3], whole)

    def total(q, d):
        return jnp.sum(losses.in_batch(q, d, *arrays(ids, ids[:, :1]), symmetric=symmetric)[:3])

    gradients = jax.grad(total, argnums=(0, 1))(*arrays(queries, documents))
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.any(gradients[1][3:])


def test_orthogonal_wants_cosine_1_and_0_pair_by_pair():
    cosines = np.einsum("bd,bkd->bk", unit(QUERIES), unit(DOCUMENTS))
    expected = np.stack([(cosines[:, 0] - 1) ** 2, cosines[:, 1] ** 2, cosines[:, 2] ** 2], axis=1)
    assert_close(losses.orthogonal(*arrays(QUERIES, DOCUMENTS)), expected)
    alone = [losses.orthogonal(*arrays(QUERIES[i : i + 1], DOCUMENTS[i : i + 1]))[0] for i in range(B)]
    assert_close(jnp.stack(alone), expected)


def test_prototype_is_half_the_squared_distance_of_unit_vectors():
    teacher = RNG.normal(size=(B, D))
    expected = np.sum((unit(QUERIES) - unit(teacher)) ** 2, axis=-1) / 2
    assert_close(losses.prototype(*arrays(QUERIES, teacher)), expected)


def test_margin_mse_squares_the_difference_of_margins():
    s, t = RNG.normal(size=(2, B, K))
    expected = ((s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])) ** 2
    assert_close(losses.margin_mse(*arrays(s, t)), expected)


def test_margin_mse_does_not_depend_on_the_origin_of_either_score_but_on_its_unit():
    s, t = RNG.normal(size=(2, B, K))
    loss = losses.margin_mse(*arrays(s, t))
    assert_close(losses.margin_mse(*arrays(s + 3, t)), loss)
    assert_close(losses.margin_mse(*arrays(s, t - 11)), loss)
    assert not np.allclose(losses.margin_mse(*arrays(s, 2 * t)), loss)


@pytest.mark.parametrize("name", ["orthogonal", "prototype", "own_scores"])
def test_a_vector_of_length_0_has_a_finite_gradient(name):
    function = getattr(losses, name)
    gradient = jax.grad(lambda q: jnp.sum(function(q, jnp.ones((1, D) if name == "prototype" else (1, 2, D)))))
    assert np.isfinite(gradient(jnp.zeros((1, D)))).all()
