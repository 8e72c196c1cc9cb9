"""Balanced classes: what each row, word or decision weighs, against scikit-learn and by hand."""

import numpy as np
import pytest

from experiments.data.labelled import Examples
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.class_weights import balance, weights_of
from experiments.encoders.objectives import Target, make_objective


def rows_of(kind, classes, texts, labels):
    target = Target(kind, classes=classes, max_len=32)
    return make_objective(target, ByteTokenizer()).rows(Examples(texts, None, labels))


def test_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 6 + [1] * 3 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights_of(np.bincount(labels)), expected, rtol=1e-6)
    assert weights_of(np.array([2, 0])).tolist() == [0.5, 0]


def test_every_class_weighs_the_same():
    rows = rows_of("classification", ("a", "b"), ["x"] * 4, ["a", "a", "a", "b"])
    balance(rows, "classification", 2)
    assert rows(np.array([0, 3, -1]))["weights"].tolist() == pytest.approx([2 / 3, 2, 0])


def test_every_tag_weighs_the_same_and_tokens_between_weigh_nothing():
    rows = rows_of("tagging", ("N", "O"), [["xx", "is", "y"], ["no"]], [["N", "O", "O"], ["O"]])
    before = rows(np.array([0, 1]))["weights"]
    balance(rows, "tagging", 2)
    batch = rows(np.array([0, 1]))
    assert ((batch["weights"] > 0) == (before > 0)).all()
    totals = [batch["weights"][(batch["labels"] == tag) & (before > 0)].sum() for tag in (0, 1)]
    assert totals == pytest.approx([2, 2])


def test_having_a_class_and_not_having_it_weigh_the_same():
    rows = rows_of("multi-label", ("a", "b"), ["x"] * 4, [["a", "b"], ["b"], ["b"], []])
    assert rows(np.arange(4))["weights"].tolist() == [[1, 1]] * 4
    balance(rows, "multi-label", 2)
    batch = rows(np.arange(4))
    for column in (0, 1):
        weights, there = batch["weights"][:, column], batch["labels"][:, column] > 0
        assert weights[there].sum() == pytest.approx(2)
        assert weights[~there].sum() == pytest.approx(2)


def test_numbers_have_no_classes():
    with pytest.raises(ValueError, match="--class-weights balanced counts classes; --kind regression has none"):
        balance(rows_of("regression", (), ["x"], [1.0]), "regression", 0)
