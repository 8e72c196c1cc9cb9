"""A bi-encoder starts from an encoder that there is, and reads longer documents than it did."""

import dataclasses

import numpy as np
import pytest

import zoo
from experiments.encoders.load import load_encoder
from experiments.retrieval.start import BiEncoderConfig, start_from
from tests.experiments.retrieval.sentence_folders import write_folder
from tests.experiments.retrieval.test_embed import make_model, save_run


def test_starts_from_a_pretrained_encoder_and_reaches_longer_documents(tmp_path):
    save_run(make_model(zoo.MaskedLMConfig, max_len=16), tmp_path / "mlm")
    config = BiEncoderConfig(init=str(tmp_path / "mlm"))
    before, after = load_encoder(tmp_path / "mlm").model, start_from(config, [], None, length=32).init
    assert isinstance(before, zoo.MaskedLM)
    assert (after.config.pool, after.config.n_labels, after.pooler) == ("mean", 0, None)
    table = np.asarray(before.encoder.position_embeddings.embedding[...])
    assert np.array_equal(after.encoder.position_embeddings.embedding[...], np.concatenate([table, table]))
    # Tuned on: what pools its rows stays, unless --pool says otherwise.
    save_run(make_model(zoo.SequenceClassifierConfig, max_len=16, n_labels=0, pool="attention"), tmp_path / "tuned")
    for asked, expected in ((None, "attention"), ("last", "last")):
        again = dataclasses.replace(config, init=str(tmp_path / "tuned"), pool=asked)
        assert start_from(again, [], None, length=32).model.pool == expected


def test_a_published_encoder_without_a_head_starts_with_the_mean(tmp_path):
    config = BiEncoderConfig(init=str(write_folder(tmp_path / "bert", "bare")))
    for fields, expected in (
        ({}, ("mean", False)),
        ({"pooler": True}, ("mean", True)),
        ({"pool": "first"}, ("first", True)),  # its own, of the next-sentence task, goes on learning
    ):
        model = start_from(dataclasses.replace(config, **fields), [], None, length=32).model
        assert (model.pool, model.pooler) == expected


def test_a_run_that_goes_on_starts_from_itself_and_flags_agree_with_the_start(tmp_path):
    kept = save_run(make_model(zoo.SequenceClassifierConfig, max_len=32, n_labels=0, pool="mean"), tmp_path / "kept")
    gone = BiEncoderConfig(init="gone")
    assert start_from(gone, [], kept, length=32).model == load_encoder(kept).model.config
    with pytest.raises(FileNotFoundError, match="gone is neither a folder"):
        start_from(gone, [], None, length=32)
    new = BiEncoderConfig(init=str(kept), model=zoo.EncoderConfig(d_model=128, dropout=0.1))
    with pytest.raises(ValueError, match=r"--model.d-model 128, but --init .*kept has 16; leave the flag out"):
        start_from(new, [], None, length=32, given={"model.d_model"})
    with pytest.raises(ValueError, match=r"--tokenizer wordpiece, but .*kept has a tokenizer of its own"):
        start_from(new, [], None, length=32, given={"tokenizer"})
    assert start_from(new, [], None, length=32, given={"model.dropout"}).model.dropout == 0.1
