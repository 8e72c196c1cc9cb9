"""Vectors of folders of sentence-transformers are those of sentence-transformers, or refused by name."""

import json

import numpy as np
import pytest

from experiments.retrieval.embed import embed_texts
from experiments.retrieval.embedder import load_embedder
from experiments.retrieval.sentence_modules import SentenceModules, read_modules
from tests.experiments.retrieval.sentence_folders import FOLDERS, TEXTS, write_folder
from zoo.published.weight_files import open_weights, save_weights


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folders_vectors_are_those_of_sentence_transformers(name, tmp_path):
    model, tokenizer, modules = load_embedder(write_folder(tmp_path / name, name))
    expected = FOLDERS[name]
    prompts = {"plain": None, "own": "a : ", "passage": modules.prompts.get("passage", "")}
    prompts |= {kind: modules.prompts.get(kind, "") for kind in ("query", "document")}
    for kind, prompt in prompts.items():
        if kind in expected:
            vectors = embed_texts(model, tokenizer, TEXTS, modules=modules, prompt=prompt)
            np.testing.assert_allclose(vectors, expected[kind], atol=2e-5, err_msg=kind)
    if "normalized" in expected:
        vectors = embed_texts(model, tokenizer, TEXTS, modules=modules, normalize=True)
        np.testing.assert_allclose(vectors, expected["normalized"], atol=2e-5)
    assert modules.width(16) == expected.get("dimension", 16) == len(expected["plain"][0])


def test_a_prompt_is_itself_or_goes_by_its_name():
    modules = SentenceModules(prompts={"query": "q: ", "a": "A "}, default_prompt="a")
    assert [modules.prompt(), modules.prompt(""), modules.prompt("x "), modules.prompt(name="query")] == [
        "A ",
        "",
        "x ",
        "q: ",
    ]
    with pytest.raises(ValueError, match="prompt_name='b', expected one of query, a"):
        modules.prompt(name="b")
    with pytest.raises(ValueError, match="expected None: the model has no prompts"):
        SentenceModules().prompt(name="b")
    assert SentenceModules(default_prompt="gone").prompt() == ""


def module(number, kind, path):
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}


BASE = [module(0, "Transformer", ""), module(1, "Pooling", "1_Pooling")]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", [*BASE, module(2, "LSTM", "2_LSTM")], "a module of type LSTM at '2_LSTM' is not supported"),
        ("modules.json", [module(0, "Transformer", "0_Transformer")], "Transformer at '0_Transformer' is not"),
        ("modules.json", [BASE[0], module(1, "Dense", "1_Dense"), BASE[1]], "a module of type Dense at '1_Dense'"),
        ("modules.json", {}, "holds dict, expected list"),
        ("modules.json", [*BASE, 3], "3, expected a module with its type and path"),
        ("modules.json", [*BASE, {"type": "a.Normalize"}], "expected a module with its type and path"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length=-1, expected null or at least 1"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length='x', expected null or at least 1"),
        ("config_sentence_transformers.json", {"truncate_dim": 2.5}, "truncate_dim=2.5, expected null or at least 1"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts={'a': 1}, expected texts by their name"),
        ("2_Dense/config.json", {"activation_function": "my.Act"}, "activation_function='my.Act' is not supported"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name='token_embeddings', exp"),
        ("2_Dense/config.json", {"bias": False}, "the weights have linear.bias, which its config.json has no use for"),
        ("2_Dense/config.json", {"use_residual": True}, "the weights have no residual.weight"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task='fill-mask', expected"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type='SparseEncoder', expected"),
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "maxsim"},
            "similarity_fn_name='maxsim', ex",
        ),
    ],
)
def test_what_there_is_no_equal_for_is_refused_by_name(file, content, message, tmp_path):
    folder = write_folder(tmp_path, "tanh")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file.rpartition('/')[0]}.*{message}"):
        read_modules(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x > 0).astype(np.int8), r"linear.weight is int8, expected floating point: codes of quantised"),
        (lambda x: x * np.nan, "linear.weight holds .* values that are infinite or not a number"),
        (lambda x: x.astype(np.float64) + 1e300, "linear.weight holds 1e\\+300, which is infinite in float32"),
    ],
)
def test_weights_behind_the_pooling_are_numbers_as_those_before_it(change, message, tmp_path):
    folder = write_folder(tmp_path, "tanh")
    tensors = {name: tensor.read() for name, tensor in open_weights(folder / "2_Dense").items()}
    save_weights(folder / "2_Dense", tensors | {"linear.weight": change(tensors["linear.weight"])})
    with pytest.raises(ValueError, match=message):
        read_modules(folder)


@pytest.mark.parametrize("mode", ["max", ["mean", "cls"], "weightedmean"])
def test_a_pooling_that_there_is_none_of_is_refused_by_name(mode, tmp_path):
    folder = write_folder(tmp_path, "mean")
    (folder / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": mode}))
    named = mode if isinstance(mode, str) else "mean_tokens, cls_token"
    with pytest.raises(ValueError, match=f"pooling by {named}, expected cls_token or mean_tokens or lasttoken"):
        load_embedder(folder)


def test_the_pooling_lies_where_modules_json_says(tmp_path):
    folder = write_folder(tmp_path, "cls")
    (folder / "1_Pooling").rename(folder / "7_Pool")
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = "7_Pool"
    (folder / "modules.json").write_text(json.dumps(listed))
    assert load_embedder(folder).model.config.pool == "first"
