"""What is searched for in an evaluation is always the same."""

from experiments.data.tokenizers import ByteTokenizer
from experiments.retrieval.beir import read_beir
from experiments.retrieval.pairs import prepare
from experiments.retrieval.searches import searches
from tests.experiments.retrieval.test_beir import write_beir


def test_the_dev_search_is_always_the_same_and_holds_every_answer(tmp_path):
    data = write_beir(tmp_path / "beir", words=4)
    prepared = [prepare(read_beir(data), ByteTokenizer(), max_query_len=24, max_doc_len=64)]
    (first,), (second,) = (searches(prepared, "dev", n_queries=5, n_documents=12) for _ in range(2))
    assert (first.qrels, first.documents) == (second.qrels, second.documents)
    assert (len(first.qrels), len(first.documents), len(set(first.documents))) == (5, 12, 12)
    assert {name for grades in first.qrels.values() for name in grades} <= set(first.documents)
    (whole,) = searches(prepared, "test")
    assert (len(whole.qrels), len(whole.documents)) == (20, 60)
