"""Answers as spans of a long text: windows that overlap, and the best span over all of them.

    [CLS] question [SEP] part of the context [SEP]        start and end of the answer, or [CLS] where it is not there

Source: Devlin et al. 2018, arXiv:1810.04805, sections 4.2 and 4.3, and run_squad.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.encoder_inputs import Encoded, join

# Tokens of a question, and of an answer, at most: run_squad.py's.
LONGEST_QUESTION = 64
LONGEST_ANSWER = 30


class Window(NamedTuple):
    """A row: a question and a part of its context."""

    row: Encoded
    example: int
    """Which question."""
    offsets: np.ndarray
    """(n, 2) where each token begins and ends in the context, in characters; (0, 0) for what is not of the context."""
    allowed: np.ndarray
    """(n,) bool: where a span may begin and end, which is in the context, or at [CLS]."""
    span: tuple[int, int]
    """Tokens that the first answer begins and ends with; (0, 0), which is [CLS], where it is not whole in here."""


def windows(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[dict[str, list]] | None,
    *,
    max_len: int,
    stride: int | None = None,
) -> list[Window]:
    """Every window of every context.

    Args:
      answers: as SQuAD has them; the first of each is the target. None: unknown.
      max_len: tokens of a row.
      stride: tokens from the beginning of one window to that of the next, at most the tokens it has room for. None:
        half of them.

    Raises:
      ValueError: max_len has no room for a question and a context.
    """
    if max_len < 8:
        raise ValueError(f"--max-len {max_len}, expected at least 8: a question and a part of its context")
    special = special_tokens(tokenizer)
    fixed = special.around + len(special.frame.between)
    rows = []
    for number, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        asked = tokenizer.encode(question)[: min(LONGEST_QUESTION, (max_len - fixed) // 2)]
        tokens, offsets = tokenizer.encode_with_offsets(context)
        first, last = -1, -1
        if answers is not None and answers[number]["text"]:
            text, start = answers[number]["text"][0], answers[number]["answer_start"][0]
            first, last = find_span(offsets, start, start + len(text))
        room = max_len - fixed - len(asked)
        step, begin = max(1, min(stride or room // 2, room)), 0
        before = len(special.frame.opening) + len(asked) + len(special.frame.between)
        while True:
            part = slice(begin, begin + room)
            row = join(special, asked, tokens[part], max_len)
            places = np.zeros((len(row.tokens), 2), np.int32)
            end = len(row.tokens) - len(special.frame.closing)
            places[before:end] = offsets[part]
            allowed = np.zeros(len(row.tokens), bool)
            allowed[before:end] = allowed[0] = True
            inside = begin <= first <= last < begin + room
            span = (first - begin + before, last - begin + before) if inside else (0, 0)
            rows.append(Window(row, number, places, allowed, span))
            if begin + room >= len(tokens):
                break
            begin += step
    return rows


def find_span(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First and last token that touch the characters from begin to end; (-1, -1) where none does."""
    touching = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))
    return (int(touching[0]), int(touching[-1])) if len(touching) else (-1, -1)


class Answer(NamedTuple):
    """What a model answers."""

    text: str
    """Characters of the context; "" where it says that the answer is not there."""
    score: float
    """Summed logits of its start and end, less those of [CLS]: above 0, an answer is likelier than none."""


def best_answers(
    rows: Sequence[Window], logits: Sequence[np.ndarray], contexts: Sequence[str], *, may_be_none: bool
) -> list[Answer]:
    """The likeliest span of every question over its windows.

    Args:
      logits: for each window (l, 2), of start and end.
      may_be_none: whether [CLS] counts as the answer that there is none.
    """
    best = [(-np.inf, "")] * len(contexts)
    nothing = [np.inf] * len(contexts)
    for window, scores in zip(rows, logits, strict=True):
        n, context = len(window.row.tokens), contexts[window.example]
        start, end = (np.where(window.allowed, scores[:n, i], -np.inf) for i in (0, 1))
        nothing[window.example] = min(nothing[window.example], float(start[0] + end[0]))
        start[0] = end[0] = -np.inf
        pairs = start[:, None] + end[None, :]
        length = np.arange(n)[None, :] - np.arange(n)[:, None]
        pairs = np.where((length >= 0) & (length < LONGEST_ANSWER), pairs, -np.inf)
        i, j = divmod(int(np.argmax(pairs)), n)
        if pairs[i, j] > best[window.example][0]:
            text = context[window.offsets[i, 0] : window.offsets[j, 1]].strip()
            best[window.example] = float(pairs[i, j]), text
    answers = []
    for (score, text), none in zip(best, nothing, strict=True):
        answers.append(Answer("" if may_be_none and none > score else text, score - none))
    return answers


def golds(labels: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The texts of every question's answers."""
    return [list(answers["text"]) for answers in labels]
