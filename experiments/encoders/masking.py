"""What a masked language model has to guess: tokens drawn anew each time, by seed and step alone.

Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1 (80 % [MASK], 10 % a random token, 10 % unchanged; a fixed
number a row, whole words as in its later release); Portes et al. 2023, arXiv:2312.17482 (30 % in training).
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.data.special_tokens import special_tokens, text_ids, whole_words
from experiments.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are hidden, and behind what."""

    rate: float = 0.3
    """Share of a row's tokens that are to be guessed, in training. MosaicBERT's and M2-BERT's 30 %; BERT's is 15 %."""
    eval_rate: float = 0.15
    """The same share in evaluation: 15 % compares with published losses."""
    mask_share: float = 0.8
    """Of these, the share that reads [MASK]. 1 masks all."""
    random_share: float = 0.1
    """Of these, the share that reads a random token. What is left reads itself."""
    whole_words: bool = False
    """Whether all tokens of a word are hidden together."""

    def __post_init__(self):
        for name in ("rate", "eval_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 0 < {name} < 1")
        for name in ("mask_share", "random_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 0 to 1")
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share={self.mask_share} and random_share={self.random_share}, expected at most 1 together"
            )


class Masked(NamedTuple):
    """Rows with some tokens hidden. k is the same for all rows of a length, so that nothing is compiled twice."""

    tokens: np.ndarray
    """(b, l) int32: what the model reads."""
    positions: np.ndarray
    """(b, k) int32: where the hidden tokens are, ascending; 0 where there are fewer than k."""
    targets: np.ndarray
    """(b, k) int32: what they were."""
    weights: np.ndarray
    """(b, k) float32: 1 for a token to guess, 0 for filling."""


class Masking:
    """Hides tokens of rows.

    Args:
      config: how many, and behind what.
      tokenizer: says which ids are text and which are parts of one word.
    """

    def __init__(self, config: MaskingConfig, tokenizer: Tokenizer):
        self.config = config
        special = special_tokens(tokenizer)
        self.mask, self.pad = special.mask, special.pad
        self.special = np.zeros(special.vocab_size, bool)
        self.special[list(special.all)] = True
        self.text = text_ids(tokenizer)
        self.inner, self.open = whole_words(tokenizer)

    def __call__(self, tokens: np.ndarray, random: np.random.Generator, *, rate: float | None = None) -> Masked:
        """Hides `rate` of each row's text, exactly (rounded, at least one): special tokens and padding never.

        Args:
          tokens: (b, l) ids.
          random: the same generator gives the same masks.
          rate: None takes the config's, for training.
        """
        rate = self.config.rate if rate is None else rate
        b, length = tokens.shape
        most = max(1, round(rate * length))
        is_text = ~self.special[tokens]
        n_text = is_text.sum(axis=1)
        wanted = np.where(n_text > 0, np.maximum(1, np.round(rate * n_text).astype(int)), 0)
        order = random.random((b, length), np.float32)
        if self.config.whole_words:
            chosen = self._whole_words(tokens, is_text, wanted, order)
        else:
            ranked = np.argsort(np.where(is_text, order, 2), axis=1, kind="stable")
            chosen = np.zeros((b, length), bool)
            np.put_along_axis(chosen, ranked, np.arange(length) < wanted[:, None], axis=1)

        positions = np.argsort(~chosen, axis=1, kind="stable")[:, :most].astype(np.int32)
        weights = np.take_along_axis(chosen, positions, axis=1)
        positions = np.where(weights, positions, 0)
        fate = random.random((b, length), np.float32)
        replacement = self.text[random.integers(len(self.text), size=(b, length))]
        hidden = np.where(fate < self.config.mask_share, self.mask, tokens)
        share = self.config.mask_share + self.config.random_share
        hidden = np.where((fate >= self.config.mask_share) & (fate < share), replacement, hidden)
        return Masked(
            np.where(chosen, hidden, tokens).astype(np.int32),
            positions,
            np.where(weights, np.take_along_axis(tokens, positions, axis=1), 0).astype(np.int32),
            weights.astype(np.float32),
        )

    def _whole_words(self, tokens, is_text, wanted, order):
        """Words in random order, until one row's number is reached; a word that would exceed it is passed over."""
        goes_on = np.zeros(tokens.shape, bool)
        goes_on[:, 1:] = self.inner[tokens[:, 1:]] & self.open[tokens[:, :-1]] & is_text[:, 1:] & is_text[:, :-1]
        chosen = np.zeros(tokens.shape, bool)
        for row in range(len(tokens)):
            starts = np.flatnonzero(~goes_on[row])
            sizes = np.diff(starts, append=tokens.shape[1])
            left = wanted[row]
            for word in np.argsort(order[row, starts], kind="stable"):
                start, size = starts[word], sizes[word]
                if size <= left and is_text[row, start]:
                    chosen[row, start : start + size] = True
                    left -= size
                    if not left:
                        break
        return chosen
