"""Texts and pairs as rows: what is cut, where the kinds change, and in which batches."""

import numpy as np
import pytest

from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.encoder_inputs import Texts, encode

BYTES = ByteTokenizer()
CLS, SEP, _, PAD, *_ = special_tokens(BYTES)


def test_single_texts():
    (text,) = encode(BYTES, ["abc"], max_len=10)
    assert text.tokens.tolist() == [CLS, 97, 98, 99, SEP]
    assert text.token_types.tolist() == [0] * 5
    (text,) = encode(BYTES, ["abcdefghijkl"], max_len=6)
    assert text.tokens.tolist() == [CLS, 97, 98, 99, 100, SEP]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("abc", "xy", ("abc", "xy")), ("abcdefgh", "xy", ("abcde", "xy")), ("ab", "uvwxyz", ("ab", "uvwxy"))]
    + [("abcdefgh", "uvwxyz", ("abcd", "uvw"))],
)
def test_of_a_pair_the_longer_text_is_cut_first(first, second, expected):
    (text,) = encode(BYTES, [first], [second], max_len=10)
    a, b = (list(part.encode()) for part in expected)
    assert text.tokens.tolist() == [CLS, *a, SEP, *b, SEP]
    assert text.token_types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)


def test_an_empty_text_is_a_row_too():
    (text,) = encode(BYTES, [""], max_len=8)
    assert text.tokens.tolist() == [CLS, SEP]


def test_batches_are_padded_to_the_bucket_of_their_longest():
    texts = Texts(encode(BYTES, ["a" * n for n in (3, 50, 200, 10)], max_len=100), special_tokens(BYTES), max_len=100)
    batch = texts(np.array([0, 1, -1]))
    assert batch["tokens"].shape == (3, 64)
    assert batch["mask"].sum(axis=1).tolist() == [5, 52, 0]
    assert (batch["tokens"][~batch["mask"]] == PAD).all()
    assert texts(np.array([2]))["tokens"].shape == (1, 100)
    seen = np.concatenate(list(texts.in_order_of_length(2)))
    assert sorted(seen[seen >= 0]) == [0, 1, 2, 3]


def test_models_that_take_padding_for_text_get_full_rows():
    texts = Texts(encode(BYTES, ["a", "b"], max_len=100), special_tokens(BYTES), max_len=100, pad_to_max=True)
    assert texts(np.array([0]))["tokens"].shape == (1, 100)


@pytest.mark.parametrize(("seconds", "max_len"), [(None, 2), (["b"], 4)])
def test_max_len_needs_room_for_every_text(seconds, max_len):
    with pytest.raises(ValueError, match=f"max_len={max_len}, expected room for"):
        encode(BYTES, ["a"], seconds, max_len=max_len)


def test_pairs_need_as_many_of_both():
    with pytest.raises(ValueError, match="2 first texts and 1 second ones, expected as many"):
        encode(BYTES, ["a", "b"], ["c"], max_len=10)
