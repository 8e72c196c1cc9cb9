import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.data import corpus, streams
from experiments.data.corpus import DataConfig, load_corpus
from experiments.data.tokenizers import ByteTokenizer, train_bpe
from tests.experiments.data.texts import LONG, documents_of, stream_of

pytestmark = pytest.mark.usefixtures("cache")


def test_every_byte_and_token_is_accounted_for(default_corpus):
    for stream in default_corpus[1:]:
        assert stream.tokens[0] == stream.tokens[-1] == default_corpus.tokenizer.eot
        assert (stream.tokens[stream.starts] == default_corpus.tokenizer.eot).all()
        assert stream.n_tokens == stream.n_bytes + stream.n_documents  # each document predicts its bytes and an eot
        assert stream.n_bytes == sum(len(stream.document(i)) for i in range(stream.n_documents))


def test_text_that_spells_the_separator_opens_no_document(tmp_path):
    text = "one <|endoftext|> two " * 40
    (tmp_path / "a.txt").write_text(text)
    bpe = train_bpe([text], 300)
    bpe.save(tmp_path / "bpe")
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "bpe"), seq_len=8))
    assert (corpus.train.tokens == bpe.eot).sum() == 2
    assert "".join(next(iter(side.values())) for side in documents_of(corpus).values()) == text


def test_long_documents_are_tokenised_in_chunks(text, monkeypatch):
    whole = load_corpus(text)
    monkeypatch.setattr("experiments.data.tokenizers.PIECE", 50)
    monkeypatch.setattr(streams, "CHUNK", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(text.path).parent / "other"))
    chunked = load_corpus(text)
    for stream, other in zip(whole[1:], chunked[1:], strict=True):
        assert np.array_equal(stream.tokens, other.tokens)
        assert np.array_equal(stream.starts, other.starts)
        assert stream.n_bytes == other.n_bytes


def test_bpe_stream_decodes_to_the_text(text):
    corpus = load_corpus(DataConfig(**(vars(text) | {"tokenizer": "bpe", "bpe_vocab_size": 300})))
    sides = documents_of(corpus)
    files = {path.name: path.read_bytes() for path in Path(text.path).iterdir()}
    assert {name: value.encode() for name, value in (sides["train"] | sides["validation"]).items()} == files
    assert corpus.train.n_bytes + corpus.validation.n_bytes == sum(map(len, files.values()))
    assert corpus.train.n_tokens < corpus.train.n_bytes


# Rows.


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 50])
def test_rows_laid_end_to_end_are_the_stream(seq_len):
    stream = stream_of(3, 40, 1, 0, 16, 25)
    for partial in (False, True):
        rows = [stream.rows(seq_len, partial=partial)[i] for i in range(len(stream.rows(seq_len, partial=partial)))]
        real = [row["weights"] > 0 for row in rows]
        n_targets = sum(int(mask.sum()) for mask in real)
        assert n_targets == (stream.n_tokens if partial else stream.n_tokens // seq_len * seq_len)
        for name, offset in (("tokens", 0), ("targets", 1)):
            laid = np.concatenate([row[name][mask] for row, mask in zip(rows, real, strict=True)])
            np.testing.assert_array_equal(laid, stream.tokens[offset : offset + n_targets])


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 50])
def test_segments_and_positions_restart_at_each_document(seq_len):
    stream = stream_of(3, 40, 1, 0, 16, 25)
    starts = set(stream.starts.tolist())
    rows = stream.rows(seq_len, partial=True)
    for i in range(len(rows)):
        segment = position = 0
        row = rows[i]
        for j in range(int(row["weights"].sum())):
            if j and i * seq_len + j in starts:
                segment, position = segment + 1, 0
            assert (row["segment_ids"][j], row["positions"][j]) == (segment, position)
            position += 1
    assert {name: (values.dtype, values.shape) for name, values in row.items()} == {
        "tokens": (np.int32, (seq_len,)),
        "targets": (np.int32, (seq_len,)),
        "segment_ids": (np.int32, (seq_len,)),
        "positions": (np.int32, (seq_len,)),
        "weights": (np.float32, (seq_len,)),
    }


def test_padding_is_a_segment_of_its_own():
    row = stream_of(4, 2).rows(12, partial=True)[0]
    assert row["segment_ids"].tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert row["weights"].tolist() == [1] * 8 + [0] * 4


# The cache.


def test_second_run_maps_the_tokens_of_the_first(text, cache, builds):
    first = load_corpus(text)
    again = load_corpus(DataConfig(**(vars(text) | {"seq_len": 32})))
    assert len(builds) == 1
    assert isinstance(again.train.tokens.base, np.memmap)
    assert documents_of(again) == documents_of(first)
    assert (again.train.n_bytes, again.train.longest()) == (first.train.n_bytes, first.train.longest())
    [entry] = cache.iterdir()
    assert np.array_equal(np.load(entry / "train.tokens.npy"), first.train.tokens)


def test_changed_text_or_option_is_tokenised_again(text, builds):
    load_corpus(text)
    (Path(text.path) / "000.txt").write_text("changed " * 60)
    assert "changed " * 60 in str(documents_of(load_corpus(text)))
    load_corpus(DataConfig(**(vars(text) | {"validation_fraction": 0.3})))
    load_corpus(DataConfig(**(vars(text) | {"max_documents": 25})))
    load_corpus(DataConfig(**(vars(text) | {"tokenizer": "bpe", "bpe_vocab_size": 300})))
    assert len(builds) == 5


@pytest.mark.parametrize(
    "damage",
    [
        "truncate",
        "remove",
        "overwrite",
        "shift",
        "two bytes",
        "n_bytes",
        "names",
        "pipe",
        "undigested",
        "a link",
        "a file",
    ],
)
def test_damaged_cache_entry_is_built_again(damage, text, cache, builds, caplog):
    first = load_corpus(text)
    kept = first.train.tokens.tolist()
    [entry] = cache.iterdir()
    tokens = entry / "train.tokens.npy"
    content = tokens.read_bytes()
    if damage == "truncate":
        tokens.write_bytes(content[:-100])
    elif damage == "remove":
        tokens.unlink()
    elif damage == "two bytes":
        tokens.write_bytes(content[:-9] + bytes(byte ^ 1 for byte in content[-9:-7]) + content[-7:])
    elif damage == "n_bytes":
        said = json.loads((entry / "train.json").read_text())
        (entry / "train.json").write_text(json.dumps(said | {"n_bytes": said["n_bytes"] // 2}))
    elif damage == "names":
        names = (entry / "train.names.npy").read_bytes()
        (entry / "train.names.npy").write_bytes(names[:-1] + bytes([names[-1] ^ 1]))
    elif damage == "pipe":
        tokens.unlink()
        os.mkfifo(tokens)
    elif damage == "undigested":  # as earlier versions have kept them, and somebody has edited
        (entry / "train.json").write_text(json.dumps({"n_bytes": 1}))
    elif damage in ("a link", "a file"):
        entry.rename(cache.parent / "elsewhere")
        if damage == "a link":
            entry.symlink_to(cache.parent / "elsewhere")
            (cache.parent / "elsewhere" / "train.json").write_text("{")
        else:
            entry.write_text("no folder")
    elif damage == "overwrite":
        (entry / "validation.json").write_text("{")
    else:
        tokens.write_bytes(content[:128] + content[130:] + b"ab")
    again = load_corpus(text)
    assert again.train.tokens.tolist() == kept
    assert len(builds) == 2
    said = {"undigested": "is of an earlier version, without digests to check it by; it is built again", "a file": ""}
    assert said.get(damage, "is damaged") in caplog.text
    assert again.train.n_bytes == first.train.n_bytes
    load_corpus(text)
    assert len(builds) == 2


def test_what_cannot_be_built_again_stays_in_the_cache(text, cache, monkeypatch):
    load_corpus(text)
    [entry] = cache.iterdir()
    (entry / "train.json").write_text("{}")

    def fail(*args):
        raise ValueError("the source cannot be reached")

    monkeypatch.setattr(corpus, "tokenise", fail)
    with pytest.raises(ValueError, match="the source cannot be reached"):
        load_corpus(text)
    assert (entry / "train.tokens.npy").is_file()


def test_unwritable_cache_means_a_warning_and_tokens_in_memory(text, tmp_path, caplog):
    expected = documents_of(load_corpus(text))
    (tmp_path / "file").touch()
    corpus = load_corpus(DataConfig(**(vars(text) | {"cache_dir": str(tmp_path / "file" / "below")})))
    assert documents_of(corpus) == expected
    assert not isinstance(corpus.train.tokens.base, np.memmap)
    assert "cannot be kept in" in caplog.text
    assert "--data.cache-dir" in caplog.text


def test_disk_that_fills_up_means_a_warning_and_tokens_in_memory(text, cache, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streams.os, "fsync", full)
    loaded = load_corpus(text)
    assert loaded.train.n_documents + loaded.validation.n_documents == 30
    assert "No space left on device" in caplog.text
    assert list(cache.iterdir()) == []


def test_disk_that_is_full_at_the_last_write_means_a_warning_and_tokens_in_memory(tmp_path, cache, monkeypatch, caplog):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    def open_full(path, mode="r", *rest, **options):
        return io.BufferedWriter(Full(path, mode)) if mode == "wb" else opened(path, mode, *rest, **options)

    opened = Path.open
    (tmp_path / "a.txt").write_text(LONG)  # short enough to stay in the buffer until the stream is finished
    monkeypatch.setattr(Path, "open", open_full)
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.txt")))
    assert corpus.train.n_documents == 1
    assert "No space left on device" in caplog.text
    assert list(cache.iterdir()) == []


def test_interrupted_run_leaves_nothing_in_the_cache(text, cache, monkeypatch):
    def stop(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "encode_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(text)
    assert list(cache.iterdir()) == []


def test_run_that_comes_second_uses_its_own_tokens(text, cache, monkeypatch):
    original = corpus.tokenise

    def overtaken(*args):
        monkeypatch.setattr(corpus, "tokenise", original)
        load_corpus(text)  # another process finishes first
        return original(*args)

    monkeypatch.setattr(corpus, "tokenise", overtaken)
    loaded = load_corpus(text)
    assert loaded.train.n_documents + loaded.validation.n_documents == 30
    assert len(list(cache.iterdir())) == 1
