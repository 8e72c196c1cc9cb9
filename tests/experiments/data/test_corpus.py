import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.data import corpus
from experiments.data.corpus import DataConfig, evaluation_batches, load_corpus, make_batches, make_lanes
from experiments.data.tokenizers import ByteTokenizer, load_tokenizer, restore_tokenizer, save_tokenizer, train_bpe
from tests.experiments.data.texts import LONG, documents_of, fails, stream_of, write_documents
from tests.places import ROOT

pytestmark = pytest.mark.usefixtures("cache")


def test_importing_and_reading_tables_loads_neither_datasets_nor_torch(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {LONG}"}) + "\n" for i in range(3)))
    script = f"""
import sys
from experiments.data.corpus import DataConfig, load_corpus
assert not {{"datasets", "torch", "tensorflow"}} & sys.modules.keys()
load_corpus(DataConfig(path={str(tmp_path / "a.jsonl")!r}))
assert not {{"datasets", "torch", "tensorflow"}} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


def test_default_corpus_is_the_same_in_every_run(default_corpus):
    again = load_corpus(DataConfig())
    for stream, other in zip(default_corpus[1:], again[1:], strict=True):
        assert np.array_equal(stream.tokens, other.tokens)
        assert np.array_equal(stream.names, other.names)
        names = [stream.document_name(i) for i in range(stream.n_documents)]
        assert names == sorted(names)


def test_row_longer_than_every_document_needs_permission(tmp_path):
    write_documents(tmp_path / "text", 40, characters=100)
    config = {"path": str(tmp_path / "text"), "seq_len": 300}
    corpus = load_corpus(DataConfig(allow_short_documents=True, **config))
    longest, name = corpus.train.longest()
    assert longest == 1 + max(len(corpus.train.document(i)) for i in range(corpus.train.n_documents))
    assert fails(DataConfig(**config)) == (
        f"--data.seq-len 300 is longer than the longest document ({longest} tokens in '{name}'); "
        f"set it to at most {longest}, or --data.allow-short-documents to train on rows of several whole documents"
    )
    load_corpus(DataConfig(path=config["path"], seq_len=longest))
    message = fails(DataConfig(path=config["path"], seq_len=10**6, allow_short_documents=True))
    assert message.startswith(f"--data.seq-len 1000000 exceeds all text to train on: {corpus.train.n_tokens} tokens")


# Batches.


def assert_same_batches(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], strict=True)


def test_batch_is_a_function_of_seed_and_step(default_corpus):
    options = {"batch_size": 4, "seq_len": 32}
    first, second = (make_batches(default_corpus.train, seed=3, **options) for _ in range(2))
    batches = [next(first) for _ in range(6)]
    assert_same_batches([next(second) for _ in range(6)], batches)
    second.set_state({"next_index": 4})
    assert_same_batches([next(second)], batches[4:5])
    other = next(make_batches(default_corpus.train, seed=4, **options))
    assert not np.array_equal(other["tokens"], batches[0]["tokens"])
    unhurried = make_batches(default_corpus.train, seed=3, prefetch=0, **options)
    assert_same_batches([next(unhurried) for _ in range(6)], batches)


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9])
def test_restored_iterator_goes_on_exactly_also_over_the_end_of_an_epoch(stop):
    stream = stream_of(30, 30, 30)  # 13 rows of 7: an epoch ends inside the third batch of 5
    options = {"batch_size": 5, "seq_len": 7, "seed": 1}
    iterator = make_batches(stream, **options)
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(8)]
    restored = make_batches(stream, **options)
    next(restored)
    restored.set_state(state)
    assert_same_batches([next(restored) for _ in range(8)], expected)
    iterator.set_state(state)
    assert_same_batches([next(iterator) for _ in range(8)], expected)


def test_lanes_go_on_where_the_batch_before_ended_and_say_so():
    stream = stream_of(13, 30, 6, 47, 5, 80, 13)  # documents open inside rows and at their first tokens alike
    options = {"batch_size": 3, "seq_len": 7, "seed": 1}
    lanes, n_rows = make_lanes(stream, **options), len(stream.rows(7))
    batches = [next(lanes) for _ in range(4 * (n_rows // 3))]
    seen = set()
    for before, after in itertools.pairwise(batches):
        for i, continues in enumerate(after["continues"]):
            follows = before["targets"][i, -1] == after["tokens"][i, 0]
            opens = after["tokens"][i, 0] == 256
            assert not continues or (follows and not opens)
            seen.add((bool(continues), bool(opens)))
    assert not batches[0]["continues"].any()
    assert seen == {(True, False), (False, True), (False, False)}
    starts = sum(not batch["continues"].any() for batch in batches)
    assert 4 <= starts <= 8  # epochs, and steps in which a document opens in every lane
    epoch = np.concatenate([batch["tokens"] for batch in batches[: n_rows // 3]])
    assert len({row.tobytes() for row in epoch}) == len(epoch)


def test_restored_lanes_go_on_exactly():
    stream, options = stream_of(*[40] * 8), {"batch_size": 4, "seq_len": 9, "seed": 2}
    lanes = make_lanes(stream, **options)
    for _ in range(5):
        next(lanes)
    state = json.loads(json.dumps(lanes.get_state()))
    restored = make_lanes(stream, **options)
    restored.set_state(state)
    assert_same_batches([next(restored) for _ in range(9)], [next(lanes) for _ in range(9)])


def test_more_lanes_than_rows_is_an_error():
    with pytest.raises(ValueError, match="batch_size=9 lanes of seq_len=5 need 45 tokens; the train text has 41"):
        make_lanes(stream_of(40), batch_size=9, seq_len=5, seed=0)


def test_an_epoch_holds_each_row_once_and_the_next_one_has_another_order():
    stream = stream_of(*[9] * 40)
    n_rows = len(stream.rows(10))
    assert n_rows == 40

    def epochs(seed):
        iterator = make_batches(stream, batch_size=8, seq_len=10, seed=seed)
        return [np.concatenate([next(iterator)["tokens"] for _ in range(5)]) for _ in range(3)]

    rows = np.stack([stream.rows(10)[i]["tokens"] for i in range(n_rows)])
    orders = [epoch.tolist() for seed in (0, 1, 2) for epoch in epochs(seed)]
    for order in orders:
        assert sorted(order) == sorted(rows.tolist())
    assert len({str(order) for order in orders}) == 9  # neighbouring seeds do not share epochs either
    assert rows.tolist() not in orders


def test_stream_with_fewer_rows_than_a_batch_repeats_them():
    batch = next(make_batches(stream_of(20), batch_size=7, seq_len=10, seed=0))
    assert batch["tokens"].shape == (7, 10)
    assert len(np.unique(batch["tokens"], axis=0)) == 2
    assert (batch["weights"] == 1).all()


def test_hosts_share_the_rows_that_one_host_would_get():
    stream = stream_of(*[13] * 20)
    options = {"batch_size": 6, "seq_len": 5, "seed": 0}
    alone = make_batches(stream, **options)
    hosts = [make_batches(stream, shard=(i, 3), **options) for i in range(3)]
    for _ in range(20):
        parts = [next(host)["tokens"] for host in hosts]
        assert {part.shape for part in parts} == {(2, 5)}
        assert np.concatenate(parts).tolist() == next(alone)["tokens"].tolist()


@pytest.mark.parametrize(("batch_size", "n_hosts"), [(1, 1), (3, 1), (4, 1), (64, 1), (4, 2)])
def test_evaluation_covers_each_token_exactly_once(batch_size, n_hosts):
    stream = stream_of(3, 40, 1, 0, 16, 25, 11)
    evaluations = [
        evaluation_batches(stream, batch_size=batch_size, seq_len=8, shard=(i, n_hosts)) for i in range(n_hosts)
    ]
    for _ in range(2):  # it can be iterated over again
        hosts = [list(evaluation) for evaluation in evaluations]
        assert len({len(batches) for batches in hosts}) == 1
        batches = [batch for host in hosts for batch in host]
        assert {batch[name].shape for batch in batches for name in batch} == {(batch_size // n_hosts, 8)}
        targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
        assert sum(batch["weights"].sum() for batch in batches) == stream.n_tokens
        assert sorted(targets.tolist()) == sorted(stream.tokens[1:].tolist())
        if n_hosts == 1:
            np.testing.assert_array_equal(targets, stream.tokens[1:])


def test_short_evaluation_is_spread_over_the_stream():
    stream = stream_of(799)
    rows = [stream.rows(8)[i]["tokens"].tolist() for i in range(100)]
    batches = list(evaluation_batches(stream, batch_size=5, seq_len=8, max_batches=4))
    chosen = [rows.index(row) for batch in batches for row in batch["tokens"].tolist()]
    assert chosen == list(range(0, 100, 5))
    assert len(list(evaluation_batches(stream, batch_size=5, seq_len=8, max_batches=1000))) == 20


def test_batches_say_what_is_wrong_with_their_sizes():
    with pytest.raises(ValueError, match="batch_size=5, expected a multiple of the number of hosts, 2"):
        make_batches(stream_of(50), batch_size=5, seq_len=8, seed=0, shard=(0, 2))
    with pytest.raises(ValueError, match="batch_size=0, expected at least 1"):
        evaluation_batches(stream_of(50), batch_size=0, seq_len=8)
    with pytest.raises(ValueError, match="max_batches=0 must be at least 1"):
        evaluation_batches(stream_of(50), batch_size=1, seq_len=8, max_batches=0)
    with pytest.raises(ValueError, match="seq_len=52 must be at most 51, the tokens of the train text"):
        make_batches(stream_of(50), batch_size=5, seq_len=52, seed=0)


# The tokenizer of a run.


def test_run_folder_keeps_the_tokenizer(text, tmp_path, builds):
    config = DataConfig(**(vars(text) | {"tokenizer": "bpe", "bpe_vocab_size": 300}))
    first = load_corpus(config, tmp_path / "run")
    assert restore_tokenizer(tmp_path / "run").to_json() == first.tokenizer.to_json()
    assert first.tokenizer.vocab_size == 300
    load_corpus(text, tmp_path / "run-bytes")
    assert restore_tokenizer(tmp_path / "run-bytes").kind == "bytes"
    write_documents(tmp_path / "text", 35)  # other text would train another tokenizer
    again = load_corpus(config, tmp_path / "run")
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert len(builds) == 3


def test_bpe_is_trained_once_and_on_the_training_text_only(text, monkeypatch):
    config = DataConfig(**(vars(text) | {"tokenizer": "bpe", "bpe_vocab_size": 300, "validation_fraction": 0.3}))
    seen = []

    def spy(spec, texts=None, *args):
        seen.append(list(texts))
        return load_tokenizer(spec, seen[-1], *args)

    monkeypatch.setattr(corpus, "load_tokenizer", spy)
    first = load_corpus(config)
    assert seen == [list(documents_of(first)["train"].values())]
    again = load_corpus(config)
    assert len(seen) == 1
    assert again.tokenizer.to_json() == first.tokenizer.to_json()


def test_tokenizer_other_than_the_runs_is_refused(text, tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path / "run")
    bpe = train_bpe([LONG], 280)
    bpe.save(tmp_path / "bpe")
    other = train_bpe(["another text " * 9], 270)
    other.save(tmp_path / "other")
    for spec, folder in [("bpe", "run"), ("bytes", "bpe"), (str(tmp_path / "other"), "bpe"), ("gpt2", "run")]:
        with pytest.raises(ValueError, match=rf"--data\.tokenizer '{spec}' is not the tokenizer of '.*{folder}' \("):
            load_corpus(DataConfig(**(vars(text) | {"tokenizer": spec})), tmp_path / folder)
    with pytest.raises(ValueError, match="is not the tokenizer of"):
        load_corpus(DataConfig(**(vars(text) | {"tokenizer": "bpe", "bpe_vocab_size": 257})), tmp_path / "bpe")
    for spec in ("bpe", str(tmp_path / "bpe"), "someone/gone"):
        corpus = load_corpus(DataConfig(**(vars(text) | {"tokenizer": spec})), tmp_path / "bpe")
        assert corpus.tokenizer.to_json() == bpe.to_json()
