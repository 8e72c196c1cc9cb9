"""Encoders behind the interface of a SentenceTransformer, as evaluators call it."""

import numpy as np
import pytest

from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.load import load_encoder
from experiments.retrieval.embed import embed_texts
from experiments.retrieval.embedder import load_embedder
from experiments.retrieval.sentence_transformer import as_sentence_transformer
from tests.experiments.retrieval.sentence_folders import FOLDERS, TEXTS, write_folder
from tests.experiments.retrieval.test_embed import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("st"), "default-prompt")


@pytest.fixture(scope="module")
def model(folder):
    return as_sentence_transformer(folder)


def test_it_encodes_as_sentence_transformers_does(model):
    expected = FOLDERS["default-prompt"]
    for vectors, kind in (
        (model.encode(TEXTS), "plain"),
        (model.encode(inputs=tuple(TEXTS), batch_size=1, show_progress_bar=False), "plain"),
        (model.encode_query(TEXTS), "query"),
        (model.encode_document(TEXTS), "document"),
        (model.encode(TEXTS, prompt_name="passage"), "passage"),
        (model.encode_query(TEXTS, prompt="a : "), "own"),
        (model.encode(TEXTS, prompt_type="query", task_name="a task"), "query"),
        (model.encode([{"text": TEXTS[:2]}, {"text": TEXTS[2:]}], prompt_type="document"), "document"),
    ):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected[kind], atol=2e-5, err_msg=kind)
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected["plain"][0], atol=2e-5)
    assert model.max_seq_length == model.get_max_seq_length() == expected["max_seq_length"]
    assert model.get_sentence_embedding_dimension() == model.get_embedding_dimension() == 16


def test_vectors_are_cut_and_then_normalised(model):
    short = model.encode(TEXTS, truncate_dim=3, normalize_embeddings=True)
    plain = model.encode(TEXTS)[:, :3]
    np.testing.assert_allclose(short, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)


def test_a_shorter_longest_text_may_be_set(folder):
    model = as_sentence_transformer(folder)
    model.max_seq_length = 8
    expected = embed_texts(*load_embedder(folder)[:2], TEXTS, modules=load_embedder(folder).modules, max_len=8)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6)


def test_similarities_are_what_they_are_called(model):
    x, y = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32), np.array([[0.0, 2.0], [6.0, 8.0]], np.float32)
    expected = {
        "cosine": [[0.8, 1.0], [0.0, 0.6]],
        "dot": [[8.0, 50.0], [0.0, 6.0]],
        "euclidean": [[-np.sqrt(13), -5.0], [-np.sqrt(5), -np.sqrt(89)]],
        "manhattan": [[-5.0, -7.0], [-3.0, -13.0]],
    }
    try:
        for name, scores in expected.items():
            model.similarity_fn_name = name
            np.testing.assert_allclose(model.similarity(x, list(y)), scores, rtol=1e-6)
            np.testing.assert_allclose(model.similarity_pairwise(x, y), np.diag(scores), rtol=1e-6)
        model.similarity_fn_name = "maxsim"
        with pytest.raises(ValueError, match="similarity_fn_name='maxsim', expected one of cosine, dot"):
            model.similarity(x, y)
    finally:
        model.similarity_fn_name = "cosine"


def test_any_source_of_a_model_will_do(folder, model):
    expected = model.encode(TEXTS, prompt="")
    for source in (str(folder), load_embedder(folder), load_encoder(folder)):
        np.testing.assert_allclose(as_sentence_transformer(source).encode(TEXTS, prompt=""), expected, atol=1e-6)
    ours, tokenizer = make_model(n_labels=0, pool="mean", pooler=False, max_len=100), ByteTokenizer()
    wrapped = as_sentence_transformer(ours, tokenizer)
    np.testing.assert_allclose(wrapped.encode(TEXTS), embed_texts(ours, tokenizer, TEXTS), atol=1e-6)
    with pytest.raises(ValueError, match="tokenizer=None with a model, expected the model's tokenizer"):
        as_sentence_transformer(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_value": "token_embeddings"}, "output_value='token_embeddings', expected 'sentence_embedding'"),
        ({"precision": "int8"}, "precision='int8', expected 'float32'"),
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"prompt_name": "no"}, "prompt_name='no', expected one of "),
    ],
)
def test_what_it_cannot_do_is_named(options, message, model):
    with pytest.raises(ValueError, match=message):
        model.encode(TEXTS, **options)
    with pytest.raises(ValueError, match="sentences has int, expected texts"):
        model.encode([1])


class Retrieval:
    """Calls what sentence-transformers' InformationRetrievalEvaluator calls, but for torch."""

    def __call__(self, model, queries, corpus):
        options = {"prompt_name": None, "prompt": None, "batch_size": 32, "show_progress_bar": False}
        options |= {"convert_to_tensor": False, "truncate_dim": None}
        asked, found = model.encode_query(queries, **options), model.encode_document(corpus, **options)
        scores = {model.similarity_fn_name: model.similarity}
        ranks = {name: np.argsort(-score(asked, found), axis=1)[:, 0] for name, score in scores.items()}
        model.model_card_data.set_evaluation_metrics(self, {"cosine_first": float(ranks["cosine"][0])}, -1, -1)
        return ranks


def test_an_evaluator_gets_what_it_asks_for(model):
    ranks = Retrieval()(model, [TEXTS[0]], ["far far away", TEXTS[0], "mat"])
    assert ranks["cosine"].tolist() == [1]
    assert model.model_card_data.metrics == {"cosine_first": 1.0}


def test_evaluators_of_sentence_transformers_measure_the_same(model, folder):
    library = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    texts = [*TEXTS, "far far", "the mat", "cats"]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    for evaluator in (
        evaluation.InformationRetrievalEvaluator({"q": "the cat"}, documents, {"q": {"d0", "d5"}}),
        evaluation.EmbeddingSimilarityEvaluator(texts, texts[::-1], [0.1, 0.5, 1, 0.3, 0.7, 0]),
        evaluation.TranslationEvaluator(texts, texts[::-1]),
    ):
        measured, expected = evaluator(model), evaluator(theirs)
        assert measured == pytest.approx(expected, abs=1e-5)
