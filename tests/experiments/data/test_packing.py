"""Documents in rows: nothing lost, nothing twice, little padding, the same order again."""

import itertools

import numpy as np
import pytest

from experiments.data.packing import Epochs, Rows, bucket_lengths, cut, make_batches, pack
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from tests.experiments.data.texts import stream_of

SPECIAL = special_tokens(ByteTokenizer())
LENGTHS = [5, 61, 200, 1, 30, 62, 63, 12, 124, 40]


def rows(layout, lengths=LENGTHS, seq_len=64):
    return Rows(stream_of(*lengths), SPECIAL, seq_len=seq_len, layout=layout)


def texts(batch):
    """The pieces in a batch, as tuples of tokens without [CLS] and [SEP]."""
    segments = batch.get("segment_ids", np.where(batch["mask"], 0, -1))
    for row, segment in zip(batch["tokens"], segments, strict=True):
        for number in range(segment.max() + 1):
            tokens = row[segment == number]
            assert tokens[0] == SPECIAL.cls
            assert tokens[-1] == SPECIAL.sep
            yield tuple(tokens[1:-1].tolist())


def test_pieces_cover_every_document_once():
    stream = stream_of(*LENGTHS)
    pieces = cut(stream, 64)
    assert pieces.sizes.max() == 62
    owner = np.searchsorted(stream.starts, pieces.starts, side="right") - 1
    for i, length in enumerate(LENGTHS):
        parts = [stream.tokens[s : s + n] for s, n in zip(pieces.starts, pieces.sizes, strict=True)]
        joined = np.concatenate([part for part, o in zip(parts, owner, strict=True) if o == i])
        assert len(joined) == length
        np.testing.assert_array_equal(joined, stream.document(i))


@pytest.mark.parametrize("layout", ["packed", "padded", "buckets"])
def test_an_epoch_has_every_piece_once(layout):
    made = rows(layout)
    stream, pieces = made.stream, made.pieces
    expected = sorted(
        tuple(stream.tokens[s : s + n].tolist()) for s, n in zip(pieces.starts, pieces.sizes, strict=True)
    )
    plan = Epochs(made.bucket, made.rows_per_batch(2), seed=0)
    for epoch in range(2):
        batches = [made(plan(epoch * plan.n_batches + i)) for i in range(plan.n_batches)]
        assert sorted(itertools.chain(*map(texts, batches))) == expected
    n_tokens = sum(int(batch["mask"].sum()) for batch in batches)
    assert n_tokens == made.n_tokens == sum(pieces.sizes + 2)


def test_packing_fills_rows():
    random = np.random.default_rng(0)
    sizes = random.integers(3, 100, 2000)
    packed = pack(sizes, 128)
    assert sorted(itertools.chain(*packed)) == list(range(2000))
    assert max(sizes[row].sum() for row in packed) <= 128
    assert len(packed) <= 1.01 * np.ceil(sizes.sum() / 128)


def test_packed_rows_are_fuller_than_padded_ones():
    lengths = np.random.default_rng(0).integers(1, 62, 200).tolist()
    fills = {layout: rows(layout, lengths).fill for layout in ("padded", "buckets", "packed")}
    assert fills["padded"] < fills["buckets"] < fills["packed"]
    assert fills["packed"] > 0.9


def test_padding_is_no_document():
    made = rows("packed", [20, 10, 45])
    batch = made(np.arange(len(made)))
    np.testing.assert_array_equal(batch["mask"], batch["segment_ids"] >= 0)
    assert (batch["tokens"][~batch["mask"]] == SPECIAL.pad).all()


def test_buckets_are_powers_of_two_and_keep_the_tokens_of_a_batch():
    assert bucket_lengths(200) == [32, 64, 128, 200]
    assert bucket_lengths(16) == [16]
    made = rows("buckets", seq_len=128)
    sizes = made.rows_per_batch(8, multiple=4)
    assert [length * size for length, size in zip(made.lengths, sizes, strict=True)] == [1024] * 3
    plan = Epochs(made.bucket, sizes, seed=0)
    shapes = {made(plan(i))["tokens"].shape for i in range(plan.n_batches)}
    assert shapes <= {(32, 32), (16, 64), (8, 128)}
    assert len(shapes) == 3


def test_every_epoch_has_an_order_of_its_own_and_a_seed_gives_it_again():
    bucket = np.zeros(100, int)
    plan, again, other = (Epochs(bucket, [10], seed=seed) for seed in (0, 0, 1))
    one = np.concatenate([plan(i) for i in range(10)])
    two = np.concatenate([plan(i) for i in range(10, 20)])
    assert sorted(one) == sorted(two) == list(range(100))
    assert (one != two).any()
    np.testing.assert_array_equal(np.concatenate([again(i) for i in range(20)]), np.concatenate([one, two]))
    assert (np.concatenate([other(i) for i in range(10)]) != one).any()


def test_batches_go_on_from_a_state_and_are_cut_over_hosts():
    def make(step):
        return {"x": np.arange(4) + 10 * step}

    batches = iter(make_batches(make))
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    fresh = iter(make_batches(make))
    fresh.set_state(state)
    assert next(fresh)["x"].tolist() == next(batches)["x"].tolist() == [30, 31, 32, 33]
    halves = [next(iter(make_batches(make, shard=(i, 2))))["x"].tolist() for i in range(2)]
    assert halves == [[0, 1], [2, 3]]
    assert len(list(make_batches(make, n_batches=5))) == 5


def test_a_row_needs_room_for_a_token():
    with pytest.raises(ValueError, match="seq_len=2, expected at least 3"):
        rows("padded", seq_len=2)
