"""A run does not go on with other data, another tokenizer or other code without a word."""

import dataclasses
import json

import numpy as np
import pytest

import zoo
from experiments import causal_lm
from experiments.data.tokenizers import load_tokenizer, save_tokenizer
from experiments.loop import fingerprints
from experiments.loop.fingerprints import INPUTS_FILE, check_inputs, fingerprint
from experiments.loop.flags import UsageError
from tests.experiments.data.texts import write_documents


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        ((["a"], "b"), (["a", "b"],)),
        (("1",), (1,)),
        ((1,), (True,)),
        ((None,), ("None",)),
        (({"a": 1, "b": 2},), ({"a": 2, "b": 1},)),
        ((np.zeros(2, np.int32),), (np.zeros(1, np.int64),)),
        ((np.array(["a", "b"], "S1"),), (np.array(["a", "c"], "S1"),)),
    ],
)
def test_what_differs_has_another_fingerprint(one, other):
    assert fingerprint(*one) == fingerprint(*one) != fingerprint(*other)


def test_of_a_large_array_blocks_are_read(monkeypatch):
    monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
    monkeypatch.setattr(fingerprints, "_BLOCK", 10)
    array = np.zeros(2000, np.uint8)
    before = fingerprint(array)
    assert fingerprint(np.zeros(2001, np.uint8)) != before
    for place in (0, 1999):
        changed = array.copy()
        changed[place] = 1
        assert fingerprint(changed) != before


def test_what_changed_is_refused_by_name_until_it_is_allowed(tmp_path, capsys):
    check_inputs(tmp_path, {"data train": "other"}, ())
    check_inputs(tmp_path, {"data train": "a", "data validation": "b", "tokenizer": "t"}, ())  # nothing learned yet
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    before = (tmp_path / INPUTS_FILE).read_text()
    for inputs, what in (
        ({"data train": "A"}, r"the data \(train\) changed .*--allow-changed data "),
        ({"data validation": "B"}, r"the data \(validation\) changed"),
        ({"tokenizer": "T"}, r"the tokenizer changed .*--allow-changed tokenizer "),
    ):
        with pytest.raises(ValueError, match=what):
            check_inputs(tmp_path, inputs, ("code",))
    assert (tmp_path / INPUTS_FILE).read_text() == before
    check_inputs(tmp_path, {"data train": "A", "tokenizer": "T"}, ("data", "tokenizer"))
    assert capsys.readouterr().out.count("changed since the last start") == 2
    check_inputs(tmp_path, {"data train": "A", "data validation": "b", "tokenizer": "T"}, ())
    assert capsys.readouterr().out == ""


def test_another_version_is_said_and_no_more(tmp_path, monkeypatch, capsys):
    check_inputs(tmp_path, {}, ())
    monkeypatch.setattr(zoo, "__version__", "99.0")
    check_inputs(tmp_path, {}, ())
    assert "now by 99.0" in capsys.readouterr().out
    check_inputs(tmp_path, {}, ())
    assert capsys.readouterr().out == ""


def test_a_run_is_refused_with_an_edited_text_or_a_replaced_tokenizer(empty_folder):
    write_documents(empty_folder / "text", 30)
    tiny = causal_lm.PRESETS["tiny"][1]
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, d_model=8, n_layers=1, pattern="-/mlp"),
        data=dataclasses.replace(tiny.data, path="text", seq_len=16, tokenizer="bpe", bpe_vocab_size=260),
        train=dataclasses.replace(tiny.train, steps=1, batch_size=2, tensorboard=False),
        eval_batches=1,
    )
    folder = empty_folder / "run"
    causal_lm.fit(config, folder)

    def longer(**train):
        return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, **train))

    (edited,) = list((empty_folder / "text").rglob("*"))[:1]
    text = edited.read_text()
    edited.write_text(text.replace("a", "b"))
    with pytest.raises(UsageError, match=r"the data \((train|validation)\) changed since .*run has learned"):
        causal_lm.fit(longer(), folder)
    edited.write_text(text)

    kept = (folder / "tokenizer.json").read_bytes()
    save_tokenizer(load_tokenizer("bpe", ["zyx wvu tsr qpo " * 99], 260), folder)
    with pytest.raises(UsageError, match="the tokenizer changed"):
        causal_lm.fit(longer(), folder)
    (folder / "tokenizer.json").write_bytes(kept)

    (folder / INPUTS_FILE).unlink()  # a run of an earlier version
    finished, _ = causal_lm.fit(longer(), folder)
    assert int(finished.state.step) == 2
    assert set(json.loads((folder / INPUTS_FILE).read_text())) == {
        "version",
        "tokenizer",
        "data train",
        "data validation",
    }
