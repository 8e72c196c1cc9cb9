"""Answers to tokens and back, over windows of any length."""

import numpy as np
import pytest

from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer, train_bpe, train_wordpiece
from experiments.encoders.spans import best_answers, find_span, windows

CONTEXT = "Ann Lee met Bob at the café in Zürich, on a rainy Tuesday; they talked about the state of spaces."
ANSWERS = ["Ann Lee", "Bob", "café", "Zürich", "a rainy Tuesday", "spaces"]
TEXTS = [CONTEXT] * 3 + ["who met whom, and where?"] * 3
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "wordpiece": train_wordpiece(TEXTS, 300),
    "bpe": train_bpe(TEXTS, 320),
}


def answer(text):
    return {"text": [text], "answer_start": [CONTEXT.index(text)]}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("max_len", "stride"), [(256, None), (64, None), (64, 7)])
def test_every_answer_comes_back_from_its_tokens(name, max_len, stride):
    tokenizer = TOKENIZERS[name]
    rows = windows(
        tokenizer,
        ["who?"] * len(ANSWERS),
        [CONTEXT] * len(ANSWERS),
        [answer(text) for text in ANSWERS],
        max_len=max_len,
        stride=stride,
    )
    certain = []
    for window in rows:
        assert len(window.row.tokens) <= max_len
        logits = np.zeros((len(window.row.tokens), 2))
        logits[window.span[0], 0] = logits[window.span[1], 1] = 10
        certain.append(logits)
    said = best_answers(rows, certain, [CONTEXT] * len(ANSWERS), may_be_none=False)
    assert [a.text for a in said] == ANSWERS
    assert {window.example for window in rows if window.span != (0, 0)} == set(range(len(ANSWERS)))


def test_windows_overlap_and_hold_the_whole_context():
    tokenizer = TOKENIZERS["bytes"]
    rows = windows(tokenizer, ["q"], [CONTEXT], None, max_len=40, stride=10)
    seen = np.concatenate([window.offsets[window.offsets[:, 1] > 0, 0] for window in rows])
    assert set(seen) == set(range(len(CONTEXT)))
    assert [int(window.offsets[3, 0]) for window in rows[:3]] == [0, 10, 20]
    special = special_tokens(tokenizer)
    for window in rows:
        assert window.row.tokens[0] == special.cls
        assert window.row.tokens[2] == window.row.tokens[-1] == special.sep
        assert window.allowed.tolist() == [True, False, False, *[True] * (len(window.allowed) - 4), False]
        assert window.row.token_types.tolist() == [0, 0, 0, *[1] * (len(window.allowed) - 3)]


def test_without_an_answer_the_target_is_cls_and_counts_where_it_may():
    tokenizer = TOKENIZERS["wordpiece"]
    rows = windows(tokenizer, ["q"], [CONTEXT], [{"text": [], "answer_start": []}], max_len=256)
    assert [window.span for window in rows] == [(0, 0)]
    n = len(rows[0].row.tokens)
    logits = np.zeros((n, 2))
    logits[0] = 1
    assert best_answers(rows, [logits], [CONTEXT], may_be_none=True)[0].text == ""
    assert best_answers(rows, [logits], [CONTEXT], may_be_none=False)[0].text != ""
    logits[0] = -1
    assert best_answers(rows, [logits], [CONTEXT], may_be_none=True)[0].text != ""
    assert best_answers(rows, [logits], [CONTEXT], may_be_none=True)[0].score == pytest.approx(2)


def test_an_end_is_never_before_its_start():
    tokenizer = TOKENIZERS["bytes"]
    rows = windows(tokenizer, ["q"], ["abcdef"], None, max_len=20)
    logits = np.full((len(rows[0].row.tokens), 2), -20)
    logits[6, 0], logits[4, 1], logits[7, 1] = 5, 9, 1  # d starts; b ends, and e a little
    assert best_answers(rows, [logits], ["abcdef"], may_be_none=False)[0].text == "de"


def test_no_token_touches_what_is_not_there():
    offsets = np.array([[0, 3], [4, 7]])
    assert find_span(offsets, 0, 7) == (0, 1)
    assert find_span(offsets, 3, 4) == (-1, -1)
