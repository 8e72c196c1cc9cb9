"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from experiments.encoders.scores import (
    classification_scores,
    confusion,
    is_bio,
    multi_label_scores,
    normalise,
    regression_scores,
    squad_scores,
    tagging_scores,
    word_f1,
)


def test_two_classes_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = ["yes"] * 5 + ["no"] * 5
    predicted = ["yes"] * 3 + ["no"] * 2 + ["yes"] + ["no"] * 4
    scores = classification_scores(predicted, labels, ["no", "yes"])
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert scores["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert confusion(predicted, labels, ["no", "yes"]).tolist() == [[4, 1], [2, 3]]


def test_f1_is_that_of_the_second_class():
    scores = classification_scores(["a", "a"], ["a", "b"], ["a", "b"])
    assert scores["f1"] == 0
    assert classification_scores(["a", "a"], ["a", "b"], ["b", "a"])["f1"] == pytest.approx(2 / 3)


def test_several_classes_have_the_mean_of_their_f1():
    scores = classification_scores(["a", "a", "c"], ["a", "b", "c"], ["a", "b", "c"])
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert "f1" not in scores


def test_correlations_by_hand():
    scores = regression_scores([1.0, 2.0, 3.0, 10.0], [1.0, 3.0, 2.0, 4.0])
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    a, b = np.array([1, 2, 3, 10]) - 4.0, np.array([1, 3, 2, 4]) - 2.5
    assert scores["pearson"] == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert scores["rmse"] == pytest.approx(math.sqrt((0 + 1 + 1 + 36) / 4))


def test_a_constant_prediction_correlates_with_nothing():
    assert regression_scores([2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0, "rmse": 1.0}


def test_spans_of_bio_tags_count_whole():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    scores = tagging_scores(predicted, labels)
    # Two of the three predicted spans are right, of three there are.
    assert scores["accuracy"] == pytest.approx(5 / 6)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)


def test_other_tags_have_the_f1_of_words():
    assert is_bio(["B-X", "I-X", "O"])
    assert not is_bio(["NOUN", "VERB"])
    assert not is_bio(["O", "X"])
    scores = tagging_scores([["NOUN", "NOUN"]], [["NOUN", "VERB"]])
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 0) / 2)}


def test_squad_by_hand():
    assert normalise("The  Eiffel-Tower, (a) tower!") == "eiffeltower tower"
    assert word_f1("the big cat", "a big dog") == pytest.approx(0.5)
    scores = squad_scores(["The cat", "big red dog", "", "x"], [["cat", "dog"], ["red dog", "a fox"], [], []])
    assert scores["exact_match"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert scores["f1"] == pytest.approx((1 + 2 * 2 / 5 + 1 + 0) / 4)


def test_several_classes_are_scored_together_and_each_for_itself():
    labels, said = [["a", "b"], ["a"], [], ["b"]], [["a"], ["a"], ["b"], ["b"]]
    scores = multi_label_scores(said, labels, ("a", "b", "never"))
    # a: 2 right, none wrong. b: 1 right, 1 missed, 1 too many. Together: 3 right, 1 missed, 1 too many.
    assert scores == pytest.approx({"accuracy": 2 / 4, "micro_f1": 6 / 8, "macro_f1": (1 + 2 / 4) / 2})
    assert multi_label_scores([[]], [[]], ("a",))["accuracy"] == 1
