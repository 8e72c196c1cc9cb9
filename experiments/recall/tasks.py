"""Synthetic tasks: how their rows are drawn, and what their answers are."""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from experiments.loop.train import Batch


class Data(Protocol):
    """A synthetic task: how its rows are drawn."""

    @property
    def vocab_size(self) -> int:
        """Token ids: 0 to vocab_size - 1."""

    def sample(self, generator: np.random.Generator, rows: int, step: int) -> Batch:
        """Draws rows for a training step (1, 2, ...): only a curriculum looks at it.

        Returns:
          "tokens" (b, l), the whole input; "positions" (b, a), where an answer is asked for, "targets" (b, a), the
          answers, "weights" (b, a), 0 where a row has fewer.
        """

    def variants(self) -> "list[tuple[str, int, Data]]":
        """The rows of the final table: a field's name, its value, and the task with it."""


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """`n_tokens` data tokens at random places among noise, then as many markers: repeat them in order.

        0 0 7 0 3 0 0 0 9 0 0  15 15 15   ->   7 3 9

    Noise is 0, the marker vocab_size - 1, data what lies between.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 4.1.1, after Jing et al. 2019, arXiv:1706.02761 ("denoise").
    """

    length: int = 64
    """Positions before the markers, noise and data together. The paper's: 4096."""
    n_tokens: int = 8
    """Data tokens to remember. The paper's: 16."""
    vocab_size: int = 16
    """Token ids, noise and marker included."""
    max_eval_length: int = 512
    """The final table goes on to this length, doubling from the one that was trained."""

    def __post_init__(self):
        at_least(self, n_tokens=1, vocab_size=3, length=self.n_tokens)

    def sample(self, generator: np.random.Generator, rows: int, step: int = 0) -> Batch:
        data = generator.integers(1, self.vocab_size - 1, (rows, self.n_tokens))
        places = np.sort(_choose(generator, rows, self.length, self.n_tokens))
        tokens = np.zeros((rows, self.length + self.n_tokens), np.int32)
        np.put_along_axis(tokens, places, data, axis=1)
        tokens[:, self.length :] = self.vocab_size - 1
        positions = np.broadcast_to(np.arange(self.length, self.length + self.n_tokens), data.shape)
        return _batch(tokens, positions, data)

    def variants(self) -> list[tuple[str, int, Data]]:
        return _lengths(self, self.length)


@dataclasses.dataclass(frozen=True)
class Induction:
    """A special token comes once early and once at the end: predict the token that followed it.

        4 9 S 7 1 2 4 4 8 0 S   ->   7

    The special token is vocab_size - 1, the others are drawn uniformly.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 4.1.2, after Dao et al. 2023, arXiv:2212.14052, table 1.
    """

    length: int = 256
    """Longest row in training, the special token at its end included."""
    min_length: int = 16
    """Shortest row in training: lengths are log-uniform between the two, and the easy ones lead the way. The paper's:
    256, no shorter ones."""
    vocab_size: int = 16
    """Token ids, the special one included."""
    max_eval_length: int = 2**14
    """The final table goes on to this length, doubling from 64, all rows being of that length. The paper's: 1048576."""

    def __post_init__(self):
        at_least(self, min_length=3, length=self.min_length, vocab_size=2)

    def sample(self, generator: np.random.Generator, rows: int, step: int = 0) -> Batch:
        special = self.vocab_size - 1
        tokens = generator.integers(0, special, (rows, self.length))
        # What follows a shorter row is filler, which a causal model does not see.
        longer = generator.uniform(np.log(self.min_length), np.log(self.length + 1), (rows, 1))
        last = np.clip(np.exp(longer).astype(int), self.min_length, self.length) - 1
        first = generator.integers(0, last - 1)  # what follows it is not the last token
        np.put_along_axis(tokens, first, special, axis=1)
        np.put_along_axis(tokens, last, special, axis=1)
        return _batch(tokens, last, np.take_along_axis(tokens, first + 1, axis=1))

    def variants(self) -> list[tuple[str, int, Data]]:
        return _lengths(self, 64, "min_length")


@dataclasses.dataclass(frozen=True)
class MQAR:
    """Multi-query associative recall: pairs of key and value, then keys among filler: give each one's value.

        k1 v1 k2 v2 k3 v3 . k2 . . k3 k1 . k2   ->   v2 at k2, v3 at k3, v1 at k1

    Keys are drawn from 0 to vocab_size / 2 - 1, values from the rest; filler is any token but the row's own keys.

    Source: Arora et al. 2023, arXiv:2312.04927, section 3; random filler as in Dao & Gu 2024, arXiv:2405.21060,
      section 9.1. There every key is asked for once, after a gap drawn by a power law; here at any later positions.
    """

    length: int = 64
    """Positions of a row. The papers': 64 to 1024."""
    n_pairs: int = 16
    """Most pairs in a row. The papers': up to length / 4."""
    min_pairs: int = 1
    """Fewest pairs in a training row: each draws its number, and the easy ones lead the way."""
    n_queries: int = 32
    """Queries in a row: every key once, then any of them again. The papers': n_pairs. The default fills
    the row: a value among the filler that follows an asked key may look like a new pair."""
    vocab_size: int = 64
    """Token ids. The papers': 8192."""

    def __post_init__(self):
        at_least(self, min_pairs=1, n_pairs=self.min_pairs, n_queries=self.n_pairs, vocab_size=2 * self.n_pairs + 2)
        at_least(self, length=2 * self.n_pairs + self.n_queries)

    def sample(self, generator: np.random.Generator, rows: int, step: int = 0) -> Batch:
        n_keys, n_pairs = self.vocab_size // 2, self.n_pairs
        # A row's own order of the ids: its keys, the other keys, the values.
        keys = _choose(generator, rows, n_keys, n_keys)
        ids = np.concatenate([keys, np.tile(np.arange(n_keys, self.vocab_size), (rows, 1))], axis=1)
        tokens = np.take_along_axis(ids, generator.integers(n_pairs, self.vocab_size, (rows, self.length)), axis=1)
        values = n_keys + _choose(generator, rows, self.vocab_size - n_keys, n_pairs)
        pairs = np.stack([keys[:, :n_pairs], values], axis=2).reshape(rows, -1)
        number = generator.integers(self.min_pairs, n_pairs + 1, (rows, 1))
        tokens[:, : 2 * n_pairs] = np.where(np.arange(2 * n_pairs) < 2 * number, pairs, tokens[:, : 2 * n_pairs])

        again = generator.integers(0, number, (rows, self.n_queries))
        asked = np.where(np.arange(self.n_queries) < number, np.arange(self.n_queries), again)
        positions = 2 * n_pairs + _choose(generator, rows, self.length - 2 * n_pairs, self.n_queries)
        np.put_along_axis(tokens, positions, np.take_along_axis(keys, asked, axis=1), axis=1)
        return _batch(tokens, positions, np.take_along_axis(values, asked, axis=1))

    def variants(self) -> list[tuple[str, int, Data]]:
        numbers = [n for n in (2**i for i in range(1, 30)) if n < self.n_pairs] + [self.n_pairs]
        # Rows without the other pairs are shorter by them: no more filler than there was in training.
        lengths = [self.length - 2 * (self.n_pairs - n) for n in numbers]
        return [
            ("n_pairs", n, dataclasses.replace(self, n_pairs=n, min_pairs=n, length=length))
            for n, length in zip(numbers, lengths, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Phonebook:
    """Names with their numbers, of several tokens each, then one of the names: give its number, digit by digit.

        a c 1 7 4   b c 9 0 2   a b 3 3 8   ? b c 9 0   ->   9 0 2 at c, 9 and 0

    Letters are 0 to n_letters - 1, then ten digits, then the question mark. A row's names are all different; they have
    letters in common, so that none of them is told by one token.

    Source: the phonebook look-up of Jelassi et al. 2024, arXiv:2402.01032, section 4.2, and of Waleffe et al. 2024,
      arXiv:2406.07887, section 3.3, in synthetic tokens.
    """

    n_entries: int = 16
    """Most entries in a row."""
    min_entries: int = 1
    """Fewest entries in a training row: each draws its number, and the easy ones lead the way."""
    name_length: int = 2
    """Letters of a name."""
    number_length: int = 3
    """Digits of a number."""
    n_letters: int = 16
    """Different letters."""
    n_questions: int = 1
    """Most questions in a training row, one after another, each for another name: more to learn from a book that is
    read once. The final table asks one."""
    max_eval_entries: int = 64
    """The final table goes on to this number of entries, doubling from 2."""

    def __post_init__(self):
        at_least(self, min_entries=1, name_length=1, number_length=1, n_letters=2, n_questions=1)
        at_least(self, n_entries=max(self.min_entries, self.n_questions))
        most = max(self.n_entries, self.max_eval_entries)
        if self.n_letters**self.name_length < most:
            raise ValueError(
                f"n_letters={self.n_letters} and name_length={self.name_length} make "
                f"{self.n_letters**self.name_length} names, expected at least {most}"
            )

    @property
    def vocab_size(self) -> int:
        return self.n_letters + 11

    def sample(self, generator: np.random.Generator, rows: int, step: int = 0) -> Batch:
        entry = self.name_length + self.number_length
        chosen = _choose(generator, rows, self.n_letters**self.name_length, self.n_entries)
        powers = self.n_letters ** np.arange(self.name_length)
        names = chosen[..., None] // powers % self.n_letters
        numbers = self.n_letters + generator.integers(0, 10, (rows, self.n_entries, self.number_length))
        book = np.concatenate([names, numbers], axis=2)
        count = generator.integers(self.min_entries, self.n_entries + 1, rows)
        # The entries of the row in random order, those that it lacks behind them.
        order = np.argsort(generator.random(chosen.shape) + (np.arange(self.n_entries) >= count[:, None]), axis=1)
        asked = order[:, : self.n_questions]

        # The last digit is asked for, not read. What follows is filler, which a causal model does not see.
        marks = np.full((*asked.shape, 1), self.vocab_size - 1)
        found = np.take_along_axis(book, asked[..., None], axis=1)
        questions = np.concatenate([marks, found], axis=2).reshape(rows, -1)[:, :-1]
        tokens = np.zeros((rows, self.n_entries * entry + questions.shape[1]), np.int32)
        tokens[:, : self.n_entries * entry] = book.reshape(rows, -1)
        start = count[:, None] * entry
        np.put_along_axis(tokens, start + np.arange(questions.shape[1]), questions, axis=1)
        answers = self.name_length + np.arange(self.number_length)
        positions = start + (np.arange(self.n_questions)[:, None] * (entry + 1) + answers).reshape(-1)
        weights = np.repeat(np.arange(self.n_questions) < count[:, None], self.number_length, axis=1)
        return _batch(tokens, positions, found[..., self.name_length :].reshape(rows, -1), weights)

    def variants(self) -> list[tuple[str, int, Data]]:
        sizes = [2]
        while 2 * sizes[-1] <= self.max_eval_entries:
            sizes.append(2 * sizes[-1])
        return [("n_entries", n, dataclasses.replace(self, n_entries=n, min_entries=n, n_questions=1)) for n in sizes]


@dataclasses.dataclass(frozen=True)
class Parity:
    """Bits: at every position, is the number of ones so far odd?

        1 0 1 1 0   ->   1 1 0 1 1

    A state that only decays cannot say; one that turns round can. Rows have random lengths, the longest grows by step.

    Source: "Mamba-3", arXiv:2603.15569, the state-tracking experiments; Grazzi et al. 2024, arXiv:2411.12537.
    """

    length: int = 160
    """Longest row in training, once the curriculum is over."""
    min_length: int = 16
    """Shortest row in training, and the longest one at the start. The paper's: 3, whence fewer seeds find the way."""
    curriculum_steps: int = 1500
    """Steps over which the longest row grows to `length`. 0 has none."""
    every_position: bool = True
    """Whether every prefix of a row is asked for in training, or the whole row alone."""
    max_eval_length: int = 512
    """The final table goes on to this length, doubling from 32: the parity of whole rows. Chance is 50 %."""

    vocab_size = 2

    def __post_init__(self):
        at_least(self, min_length=1, length=self.min_length, curriculum_steps=0, max_eval_length=1)

    def sample(self, generator: np.random.Generator, rows: int, step: int = 0) -> Batch:
        share = min(1.0, step / self.curriculum_steps) if self.curriculum_steps else 1.0
        longest = self.min_length + round(share * (self.length - self.min_length))
        last = generator.integers(self.min_length, longest + 1, (rows, 1)) - 1
        tokens = generator.integers(0, 2, (rows, self.length), dtype=np.int32)
        parity = np.cumsum(tokens, axis=1) % 2
        if not self.every_position:
            return _batch(tokens, last, np.take_along_axis(parity, last, axis=1))
        positions = np.broadcast_to(np.arange(self.length), tokens.shape)
        return _batch(tokens, positions, parity, positions <= last)

    def variants(self) -> list[tuple[str, int, Data]]:
        whole = dataclasses.replace(self, curriculum_steps=0, every_position=False)
        return _lengths(whole, 32, "min_length")


def at_least(data: Any, **smallest: int) -> None:
    for name, least in smallest.items():
        if getattr(data, name) < least:
            raise ValueError(f"{name}={getattr(data, name)}, expected at least {least}")


def _choose(generator: np.random.Generator, rows: int, n: int, k: int) -> Int[np.ndarray, "b k"]:
    """k different numbers below n for each row, in random order."""
    return np.argsort(generator.random((rows, n)), axis=1)[:, :k]


def _lengths(data: Any, first: int, *others: str) -> list[tuple[str, int, Data]]:
    """A task at lengths that double from `first` to its max_eval_length."""
    lengths = [first]
    while 2 * lengths[-1] <= data.max_eval_length:
        lengths.append(2 * lengths[-1])
    return [("length", n, dataclasses.replace(data, length=n, **dict.fromkeys(others, n))) for n in lengths]


def row_length(data: Data) -> int:
    """Tokens of a row."""
    return data.sample(np.random.default_rng(0), 1, 1)["tokens"].shape[1]


def _batch(tokens, positions, targets, weights=None) -> Batch:
    weights = np.ones(targets.shape) if weights is None else weights
    return {
        "tokens": tokens.astype(np.int32),
        "positions": positions.astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": weights.astype(np.float32),
    }
