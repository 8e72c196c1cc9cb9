"""Search, BM25 and measures, against what can be worked out by hand."""

import math

import numpy as np
import pytest

from experiments.retrieval import ranking


def test_search_by_blocks_finds_what_sorting_all_scores_does():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(50, 5)).astype(np.float32)
    expected = np.argsort(-(queries @ documents.T), axis=1)[:, :6]
    for query_block, document_block in ((1000, 1000), (3, 8), (7, 1)):
        found = ranking.search(queries, documents, 6, query_block=query_block, document_block=document_block)
        assert np.array_equal(found.indices, expected)
        assert np.allclose(found.scores, np.take_along_axis(queries @ documents.T, expected, 1), atol=1e-5)
    assert ranking.search(queries, documents[:3], 6).indices.shape == (7, 3)


def test_of_equal_scores_the_first_document_comes_first():
    found = ranking.search(np.ones((1, 2), np.float32), np.ones((9, 2), np.float32), 4, document_block=2)
    assert found.indices.tolist() == [[0, 1, 2, 3]]


def test_measures_by_hand():
    run = {
        "first": {"a": 3.0, "b": 2.0, "c": 1.0},
        "second": {"a": 1.0, "b": 3.0, "c": 2.0},
        "graded": {"a": 1.0, "b": 3.0, "c": 2.0},
    }
    qrels = {"first": {"a": 1}, "second": {"c": 1, "z": 1}, "graded": {"a": 2, "b": 1}}
    each = ranking.measure_each(qrels, run)
    # second: one answer of two at rank 2. graded: gains 1, 0, 2 where 2, 1 is best.
    second = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    graded = (1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert each["ndcg@10"] == pytest.approx([1, second, graded], abs=1e-6)
    assert each["mrr@10"] == [1, 0.5, 1]
    assert each["recall@1"] == [1, 0, 0.5]
    assert each["recall@10"] == [1, 0.5, 1]
    assert ranking.measure(qrels, run)["mrr@10"] == pytest.approx(2.5 / 3)


def test_mrr_ends_at_rank_10_and_recall_at_rank_100():
    def ranked(place):
        return {"q": {f"d{i:03}": -float(i) for i in range(200)}}, {"q": {f"d{place - 1:03}": 1}}

    for place, mrr, recall in ((10, 0.1, 1), (11, 0, 1), (100, 0, 1), (101, 0, 0)):
        run, qrels = ranked(place)
        measures = ranking.measure(qrels, run)
        assert (measures["mrr@10"], measures["recall@100"]) == pytest.approx((mrr, recall))


def test_queries_without_results_count_as_0():
    qrels = {"found": {"a": 1}, "empty": {"a": 1}, "missing": {"a": 1}}
    assert ranking.measure(qrels, {"found": {"a": 1.0}, "empty": {}})["ndcg@10"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no queries"):
        ranking.measure({}, {})
    with pytest.raises(ValueError, match="'q' has no relevant document"):
        ranking.measure({"q": {"a": 0}}, {})


def test_equal_scores_rank_as_in_trec_eval():
    qrels, run = {"q": {"a": 1}}, {"q": {"a": 1.0, "b": 1.0, "c": 0.5}}
    assert [name for name, _ in ranking.in_order(run["q"])] == ["b", "a", "c"]
    assert ranking.measure(qrels, run)["mrr@10"] == 0.5
    assert ranking.measure(qrels, run)["recall@1"] == 0


def test_bm25_prefers_the_rarer_word_and_reads_the_parts_of_names():
    documents = ["common words here", "common rare thing", "common snake_case name", "common", ""]
    found = ranking.bm25(documents, ["common rare", "the case", "unknown"], k=3)
    assert found.indices[0, 0] == 1
    assert found.indices[1, 0] == 2
    assert (found.scores[1, 1:] == 0).all()
    assert found.scores[2].tolist() == [0, 0, 0]
    assert found.indices[2].tolist() == [0, 1, 2]
    assert ranking.bm25(["", ""], ["anything"]).scores.tolist() == [[0, 0]]


def test_a_run_file_has_trecs_six_columns(tmp_path):
    ranking.save_run({"a query": {"d1": 0.25, "d2": 0.5}}, tmp_path / "run.trec", tag="mine")
    assert (tmp_path / "run.trec").read_text() == "a_query Q0 d2 1 0.500000 mine\na_query Q0 d1 2 0.250000 mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.trec"]
