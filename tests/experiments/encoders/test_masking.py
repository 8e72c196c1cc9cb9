"""Masks: how many, which, behind what; and that seed and step alone decide."""

import numpy as np
import pytest

from experiments.data.special_tokens import special_tokens, text_ids, whole_words
from experiments.data.tokenizers import ByteTokenizer, train_bpe, train_wordpiece
from experiments.encoders.masking import Masking, MaskingConfig

TEXTS = ["The quick brown foxes jumped over lazy dogs, jumping and jumped again. " * 20, "unbelievable foxes " * 30]
BYTES = ByteTokenizer()
SPECIAL = special_tokens(BYTES)


def rows(b=64, length=100, fill=80):
    """[CLS] random letters [SEP] padding."""
    random = np.random.default_rng(0)
    tokens = np.full((b, length), SPECIAL.pad, np.int32)
    tokens[:, :fill] = random.integers(97, 123, (b, fill))
    tokens[:, 0], tokens[:, fill - 1] = SPECIAL.cls, SPECIAL.sep
    return tokens


def masked(config=MaskingConfig(), tokens=None, seed=0, **kwargs):
    tokens = rows() if tokens is None else tokens
    return tokens, Masking(config, BYTES)(tokens, np.random.default_rng(seed), **kwargs)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_each_row_hides_exactly_its_share_of_text(rate):
    tokens, out = masked(rate=rate)
    assert out.positions.shape == (64, round(rate * 100))
    np.testing.assert_array_equal(out.weights.sum(axis=1), round(rate * 78))
    chosen = out.weights > 0
    where = np.broadcast_to(np.arange(64)[:, None], chosen.shape)[chosen], out.positions[chosen]
    np.testing.assert_array_equal(tokens[where], out.targets[chosen])
    assert not np.isin(out.targets[chosen], list(SPECIAL.all)).any()
    assert all(len(set(row[w])) == w.sum() for row, w in zip(out.positions, chosen, strict=True))


def test_all_other_tokens_stay_as_they_are():
    tokens, out = masked()
    touched = np.zeros(tokens.shape, bool)
    np.put_along_axis(touched, np.where(out.weights > 0, out.positions, 0), True, axis=1)
    np.testing.assert_array_equal(out.tokens[~touched], tokens[~touched])


def test_80_10_10():
    _, out = masked(tokens=rows(b=2000))
    read = np.take_along_axis(out.tokens, out.positions, axis=1)[out.weights > 0]
    targets = out.targets[out.weights > 0]
    assert (read == SPECIAL.mask).mean() == pytest.approx(0.8, abs=0.01)
    # A random byte is the right one once in 256.
    assert (read == targets).mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    others = read[(read != SPECIAL.mask) & (read != targets)]
    assert len(set(others.tolist())) > 200
    assert not np.isin(others, list(SPECIAL.all)).any()


def test_all_masked():
    _, out = masked(MaskingConfig(mask_share=1, random_share=0))
    assert (np.take_along_axis(out.tokens, out.positions, axis=1)[out.weights > 0] == SPECIAL.mask).all()


def test_the_same_generator_gives_the_same_masks_and_another_one_others():
    one, again, other = (masked(seed=seed)[1] for seed in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.positions != other.positions).mean() > 0.5


def test_every_position_is_as_likely():
    counts = np.zeros(100)
    for seed in range(40):
        _, out = masked(seed=seed)
        np.add.at(counts, out.positions[out.weights > 0], 1)
    share = counts[1:79] / (40 * 64)
    assert share.min() > 0.25
    assert share.max() < 0.35


def test_a_row_of_padding_hides_nothing():
    _, out = masked(tokens=np.full((2, 10), SPECIAL.pad, np.int32))
    assert out.weights.sum() == 0


@pytest.mark.parametrize("train", [train_wordpiece, train_bpe])
def test_whole_words_are_hidden_whole(train):
    tokenizer = train(TEXTS, 300)
    special = special_tokens(tokenizer)
    text = np.resize(tokenizer.encode("foxing dogged jumpers, overly lazied; quickest brownish the it."), 200)
    tokens = np.array([[special.cls, *text, special.sep]] * 20, np.int32)
    masking = Masking(MaskingConfig(mask_share=1, random_share=0, whole_words=True), tokenizer)
    out = masking(tokens, np.random.default_rng(0))
    hidden = out.tokens == special.mask
    inner, open_ = whole_words(tokenizer)
    pairs = inner[tokens[:, 1:]] & open_[tokens[:, :-1]]
    assert pairs.sum() > 100  # there are words of several tokens
    assert (hidden[:, 1:] == hidden[:, :-1])[pairs].all()
    assert out.weights.sum(axis=1).max() <= round(0.3 * 200)
    assert out.weights.sum(axis=1).mean() > 0.25 * 200


def test_words_of_bytes_are_runs_of_letters():
    inner, open_ = whole_words(BYTES)
    text = BYTES.encode("it's a_b, é!")
    goes_on = inner[text[1:]] & open_[text[:-1]]
    words, word = [], bytes([text[0]])
    for token, same in zip(text[1:], goes_on, strict=True):
        words, word = (words, word + bytes([token])) if same else ([*words, word], bytes([token]))
    assert [w.decode() for w in [*words, word]] == ["it", "'", "s", " ", "a_b", ",", " ", "é", "!"]


def test_special_tokens_that_a_tokenizer_lacks_come_behind_its_vocabulary():
    assert SPECIAL[:5] == (257, 256, 258, 259, 260)
    bert = special_tokens(train_wordpiece(TEXTS, 300))
    assert (bert.pad, bert.cls, bert.sep, bert.mask) == (0, 2, 3, 4)
    bpe = train_bpe(TEXTS, 300)
    assert special_tokens(bpe).vocab_size == bpe.vocab_size + 3
    assert special_tokens(bpe).sep == bpe.eot


def test_text_ids_leave_special_tokens_out():
    tokenizer = train_wordpiece(TEXTS, 300)
    assert not set(text_ids(tokenizer).tolist()) & special_tokens(tokenizer).all
    assert len(text_ids(tokenizer)) == tokenizer.vocab_size - 4  # [UNK] is text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, "rate=1.5, expected 0 < rate < 1"),
        ({"eval_rate": 0}, "eval_rate=0, expected 0 < eval_rate < 1"),
        ({"mask_share": -1}, "mask_share=-1, expected 0 to 1"),
        ({"random_share": 0.3}, "mask_share=0.8 and random_share=0.3, expected at most 1 together"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**options)
