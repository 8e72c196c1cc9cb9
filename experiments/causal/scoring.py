"""How likely a causal language model finds texts of any length: by a state that is carried, piece by piece.

A text is read in pieces of PIECE tokens, and the state of one goes on into the next, so that every token is guessed
from all before it. Long convolutions reach no further than their filters: a model with an m2 reads longer texts in
windows of that length. A window knows of what is before it the last token alone, from which it guesses its first.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import zoo
from zoo.stack.backbone_config import word_config
from zoo.stack.pattern import mixer_name, pattern_mixers

PIECE = 256


class Score(NamedTuple):
    """How likely a text is."""

    tokens: int
    """That were guessed."""
    nats: float
    """Minus the logarithm of their probability."""
    windows: int
    """Pieces that know nothing of each other: 1 where the state was carried through the whole."""

    @property
    def perplexity(self) -> float | None:
        """A token, None of no tokens."""
        return math.exp(min(self.nats / self.tokens, 700)) if self.tokens else None

    def bits(self, per: int) -> float | None:
        """Each of so many bytes, or tokens; None of none."""
        return self.nats / math.log(2) / per if per and self.tokens else None


def reach(config: zoo.CausalLMConfig) -> int | None:
    """Tokens that a model can read in a row; None: any number."""
    mixers = (mixer for mixer in pattern_mixers(config.pattern, config.n_layers) if mixer_name(mixer) == "m2")
    return min((word_config(config, mixer).l_max for mixer in mixers), default=None)


def score_texts(
    model: zoo.CausalLM,
    texts: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    window: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """The score of each text, in their order.

    Args:
      texts: token ids of each; the first of a text is not guessed, so it may be what begins a document.
      batch_size: rows that are read at the same time.
      window: read texts in windows of so many tokens. None: as long as the model reads.
      progress: whether to show a bar on stderr, where that is a terminal.

    Raises:
      ValueError: a window that the model cannot read.
    """
    longest = reach(model.config)
    if window is not None and (window < 1 or (longest is not None and window > longest)):
        raise ValueError(f"window={window}, expected 1 to {longest or 'any number'}: what the model reads")
    size = window or longest
    rows = [(i, row) for i, text in enumerate(texts) for row in _windows(np.asarray(text, np.int32), size)]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][1]))
    nats, tokens, windows = (np.zeros(len(texts)) for _ in range(3))
    with tqdm(total=len(rows), unit="window", dynamic_ncols=True, disable=None if progress else True) as bar:
        for start in range(0, len(order), batch_size):
            part = [rows[row] for row in order[start : start + batch_size]]
            for (i, row), value in zip(part, _nats(model, [row for _, row in part], batch_size, longest), strict=True):
                nats[i] += value
                tokens[i] += len(row) - 1
                windows[i] += 1
            bar.update(len(part))
    return [Score(int(t), float(n), int(w)) for t, n, w in zip(tokens, nats, windows, strict=True)]


def _windows(text: np.ndarray, size: int | None) -> list[np.ndarray]:
    """A text in rows of `size` tokens and the one behind them, which is the first of the next row."""
    step = max(1, len(text) - 1) if size is None else size
    return [text[start : start + step + 1] for start in range(0, len(text) - 1, step)]


def _nats(model: zoo.CausalLM, rows: Sequence[np.ndarray], batch_size: int, longest: int | None) -> np.ndarray:
    """Minus the logarithm of each row's probability, given its first token."""
    n_pieces = -(-(max(map(len, rows)) - 1) // PIECE)
    room = PIECE * (1 << (n_pieces - 1).bit_length())  # so that few sizes of state are compiled
    tokens = np.zeros((batch_size, n_pieces * PIECE + 1), np.int32)
    there = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], there[i, : len(row)] = row, True
    graphdef, params = nnx.split(model)
    if longest is not None:  # its state holds no more; padding behind a row's end takes no room
        piece, room = min(PIECE, longest), longest
        return _pieces(graphdef, params, tokens[:, : max(map(len, rows))], there, piece, room, len(rows))
    return _pieces(graphdef, params, tokens, there, PIECE, room, len(rows))


def _pieces(graphdef, params, tokens, there, piece, room, n_rows) -> np.ndarray:
    state: Any = _begin(graphdef, params, tokens.shape[0], room)
    total = np.zeros(tokens.shape[0])
    for start in range(0, tokens.shape[1] - 1, piece):
        end = min(start + piece, tokens.shape[1] - 1)
        inputs, targets = tokens[:, start:end], tokens[:, start + 1 : end + 1]
        mask, counted = there[:, start:end], there[:, start + 1 : end + 1]
        each, state = _read(graphdef, params, state, inputs, targets, mask, counted)
        total += np.asarray(each, np.float64)
    return total[:n_rows]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _begin(graphdef, params, batch_size, room):
    return nnx.merge(graphdef, params).init_state(batch_size, room)


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef, params, state, inputs, targets, mask, counted):
    logits, state = nnx.merge(graphdef, params).extend(inputs, state, mask=mask)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.where(counted, nats, 0), axis=1), state
