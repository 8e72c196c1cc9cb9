"""Single texts and pairs as an encoder reads them: [CLS] first [SEP] second [SEP], in batches of similar length."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.packing import Batch, bucket_lengths
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.tokenizers import Tokenizer

# Texts that are tokenised at once.
CHUNK = 4096


class Encoded(NamedTuple):
    """A text, or a pair, in tokens."""

    tokens: np.ndarray
    """(n,) int32, [CLS] and [SEP] included."""
    token_types: np.ndarray
    """(n,) int32: 0, and 1 for the second text and its [SEP]."""


def encode(
    tokenizer: Tokenizer, firsts: Sequence[str], seconds: Sequence[str] | None = None, *, max_len: int
) -> list[Encoded]:
    """Texts, or pairs of texts, in tokens.

    Args:
      firsts, seconds: the texts; seconds None for single ones.
      max_len: most tokens of a row. What is longer is cut at its end, the longer text of a pair first.

    Raises:
      ValueError: max_len has no room for a token of each text.
    """
    if seconds is not None and len(seconds) != len(firsts):
        raise ValueError(f"{len(firsts)} first texts and {len(seconds)} second ones, expected as many")
    special = special_tokens(tokenizer)
    room = max_len - special.around - (0 if seconds is None else len(special.frame.between))
    if room < (1 if seconds is None else 2):
        raise ValueError(f"max_len={max_len}, expected room for [CLS], a token of each text and [SEP] behind it")
    encoded = []
    for start in range(0, len(firsts), CHUNK):
        first = tokenizer.encode_batch(firsts[start : start + CHUNK])
        second = [None] * len(first) if seconds is None else tokenizer.encode_batch(seconds[start : start + CHUNK])
        encoded += [join(special, a, b, room) for a, b in zip(first, second, strict=True)]
    return encoded


def join(special: SpecialTokens, first: np.ndarray, second: np.ndarray | None, room: int) -> Encoded:
    """Puts special tokens around one or two texts in tokens, cut to `room` tokens together, the longer one first."""
    opening, between, _, second_type = special.frame
    if second is None:
        tokens = special.row(first[:room])
        return Encoded(tokens, np.zeros_like(tokens))
    keep = min(len(second), max(room // 2, room - len(first)))
    first, second = first[: room - keep], second[:keep]
    tokens = special.row(first, between, second)
    kinds = second_type * (np.arange(len(tokens)) >= len(opening) + len(first) + len(between)).astype(np.int32)
    return Encoded(tokens, kinds)


def collate(texts: Sequence[Encoded | None], special: SpecialTokens, length: int) -> Batch:
    """Texts as rows of one length, None as an empty row: (b, l) arrays tokens, token_types, mask (False at padding)."""
    tokens = np.full((len(texts), length), special.pad, np.int32)
    token_types = np.zeros_like(tokens)
    mask = np.zeros(tokens.shape, bool)
    for i, text in enumerate(texts):
        if text is not None:
            n = len(text.tokens)
            tokens[i, :n], token_types[i, :n], mask[i, :n] = text.tokens, text.token_types, True
    return {"tokens": tokens, "token_types": token_types, "mask": mask}


class Texts:
    """Encoded texts in buckets: each is padded to the next power of two, so that few lengths are ever compiled.

    Args:
      texts: what `encode` gives.
      special: of the tokenizer.
      max_len: the longest row.
      pad_to_max: whether every row has max_len positions, as models want that take padding for text.
    """

    def __init__(self, texts: Sequence[Encoded], special: SpecialTokens, *, max_len: int, pad_to_max: bool = False):
        self.texts, self.special = texts, special
        self.lengths = [max_len] if pad_to_max else bucket_lengths(max_len)
        sizes = np.array([len(text.tokens) for text in texts], int)
        self.bucket = np.searchsorted(self.lengths, sizes)
        self.fill = float(np.divide(sizes.sum(), max(1, np.array(self.lengths)[self.bucket].sum())))
        """Share of the positions that are not padding."""

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, rows: np.ndarray) -> Batch:
        """The batch of some texts, as long as the longest needs; -1 is an empty row."""
        bucket = max((self.bucket[row] for row in rows if row >= 0), default=0)
        texts = [self.texts[row] if row >= 0 else None for row in rows]
        return collate(texts, self.special, self.lengths[bucket])

    def in_order_of_length(self, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of batches that go once over all texts, those of one bucket together; filled up with -1."""
        for number in range(len(self.lengths)):
            mine = np.flatnonzero(self.bucket == number)
            for start in range(0, len(mine), batch_size):
                rows = mine[start : start + batch_size]
                yield np.pad(rows, (0, batch_size - len(rows)), constant_values=-1)
