"""Some tokens of a BPE: every text is still written in them, and reads as before."""

import json

import numpy as np
import pytest
import tokenizers as hf

from experiments.data.fewer_tokens import most_frequent, with_tokens
from experiments.data.tokenizers import ByteTokenizer, SubwordTokenizer, train_bpe, train_wordpiece

TEXTS = [f"the {w} of {w}s, there in the {w}ing\n" for w in ("river", "mountain", "Straße", "naïve", "数学", "run")] * 3
OTHERS = ["zebra \x00\x7f Ωmega ☃ \n\n  tabs\tand 1234567890", "", "thethethe", "rivering mountainous 数数学学"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 360)


def counts_of(tokenizer, texts):
    found = np.zeros(tokenizer.vocab_size, np.int64)
    np.add.at(found, np.concatenate(tokenizer.encode_batch(texts)), 1)
    return found


def smaller(tokenizer, ids):
    return SubwordTokenizer(with_tokens(hf.Tokenizer.from_str(tokenizer.to_json()), ids))


@pytest.mark.parametrize("n", [257, 275, 308])
def test_every_text_is_written_in_the_tokens_that_stay_and_reads_the_same(tokenizer, n):
    ids = most_frequent(tokenizer, counts_of(tokenizer, TEXTS), n)
    few = smaller(tokenizer, ids)
    assert len(ids) == few.vocab_size == n
    names = {i: token for token, i in tokenizer.vocabulary().items()}
    assert few.vocabulary() == {names[old]: new for new, old in enumerate(ids.tolist())}
    for text in (*TEXTS, *OTHERS):
        encoded = few.encode(text)
        assert not len(encoded) or encoded.max() < n
        assert few.decode(encoded) == text
    for new, old in enumerate(ids.tolist()):  # each can still be made, as it was
        text = tokenizer.decode([old])
        if tokenizer.encode(text).tolist() == [old]:
            assert few.encode(text).tolist() == [new]


def test_a_text_of_tokens_that_stay_has_the_same_ones(tokenizer):
    seen = TEXTS[:2]
    counts = counts_of(tokenizer, seen)
    made = most_frequent(tokenizer, counts, tokenizer.vocab_size)
    ids = next(
        ids
        for n in range(257, tokenizer.vocab_size + 1)
        if set(np.flatnonzero(counts)) <= set(ids := most_frequent(tokenizer, counts, n).tolist())
    )
    assert len(ids) < len(made) == tokenizer.vocab_size
    few = smaller(tokenizer, ids)
    for text in seen:
        assert [ids[i] for i in few.encode(text)] == tokenizer.encode(text).tolist()


def test_the_tokens_that_a_text_makes_most_often_stay(tokenizer):
    """Those too of which others are made: no token of the text is one of them."""
    counts = counts_of(tokenizer, ["there " * 50])
    kept = {tokenizer.decode([i]) for i in most_frequent(tokenizer, counts, 263)}
    assert {"the", "th", "re"} & kept
    assert " mountain" not in kept


def test_special_tokens_stay_where_post_processors_and_other_files_find_them():
    """A BPE that falls to bytes, with tokens around a text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "▁a",
        "ab",
        "▁ab",
        "bc",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("b", "c")]
    whole = hf.Tokenizer(hf.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    whole.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(), hf.decoders.Strip(" ", 1, 0)]
    )
    whole.add_special_tokens(["<unk>", "<s>", "</s>", "<extra>"])
    whole.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A <extra>", special_tokens=[("<s>", 1), ("<extra>", len(pieces))]
    )
    tokenizer = SubwordTokenizer(whole)
    counts = counts_of(tokenizer, ["ab ab ab c", "ab ☃"])
    ids = most_frequent(tokenizer, counts, 264)
    assert [pieces[i] for i in ids if 259 <= i < len(pieces)] == ["▁", "a", "b", "▁a"]
    few = with_tokens(hf.Tokenizer.from_str(tokenizer.to_json()), ids)
    assert few.encode("c ab").ids[:: len(few.encode("c ab").ids) - 1] == [1, 263]
    assert SubwordTokenizer(few).decode(SubwordTokenizer(few).encode("ab c ☃ bc")) == "ab c ☃ bc"


def test_what_has_no_fewer_tokens_is_said(tokenizer):
    counts = counts_of(tokenizer, TEXTS)
    with pytest.raises(ValueError, match="vocabulary=100, but the model reads bytes"):
        most_frequent(ByteTokenizer(), np.zeros(257), 100)
    with pytest.raises(ValueError, match="with a wordpiece tokenizer, expected a BPE"):
        most_frequent(train_wordpiece(TEXTS, 300), counts, 280)
    for n in (256, tokenizer.vocab_size + 1):
        with pytest.raises(ValueError, match=f"vocabulary={n}, expected 257 to {tokenizer.vocab_size}: 256 letters"):
            most_frequent(tokenizer, counts, n)
    description = json.loads(tokenizer.to_json())
    description["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(ValueError, match="BPE of end_of_word_suffix='</w>', expected none"):
        most_frequent(SubwordTokenizer(hf.Tokenizer.from_str(json.dumps(description))), counts, 300)
