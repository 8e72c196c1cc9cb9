"""Texts that go on: prompts in one batch, each until the model ends it, a stop string comes, or it is long enough."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import zoo
from experiments.data.text_stream import TextStream
from experiments.data.tokenizers import Tokenizer


class Continuation(NamedTuple):
    """What a prompt went on with."""

    text: str
    """Without the prompt, and without the stop string: behind the prompt's text it reads on as the tokens say."""
    tokens: int
    """How many were generated, one that ends the document and those of a stop string included."""
    finished: Literal["end", "stop", "length"]
    """The model ended the document; a stop string came; or there were as many tokens as were asked for."""


def continue_prompts(
    model: zoo.CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: zoo.Sampling,
    key: jax.Array,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
    first_row: int = 0,
    apart: bool = False,
) -> list[Continuation]:
    """A continuation of each prompt, in one batch; each row gets what it would get alone.

    Args:
      prompts: token ids.
      key: row i draws from fold_in(key, first_row + i).
      ends: ids that end a text each. None given: the tokenizer's eot.
      stop: strings that end a text where one first comes.
      first_row: number of the first prompt, where these are some of more.
      apart: whether a continuation is a text by itself, as a chat's reply is, and not more of its prompt's.
    """
    ends = tuple(ends) or (tokenizer.eot,)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(len(prompts)))
    streams = [TextStream(tokenizer, () if apart else prompt, ends) for prompt in prompts]
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    done: list[Continuation | None] = [None] * len(prompts)
    options: dict[str, Any] = {"sampling": sampling, "eos_id": ends, "key": keys}
    for tokens in zoo.generate_stream(model, prompts, max_new_tokens, **options):
        for i, token in enumerate(tokens.tolist()):
            if done[i] is not None:
                continue
            counts[i] += 1
            texts[i] += streams[i].rest() if token in ends else streams[i].add(token)
            if (cut := first_of(texts[i], stop)) is not None:
                done[i] = Continuation(texts[i][:cut], counts[i], "stop")
            elif token in ends:
                done[i] = Continuation(texts[i], counts[i], "end")
        if all(one is not None for one in done):
            break
    for i, one in enumerate(done):
        if one is None:
            texts[i] += streams[i].rest()
    return [one or Continuation(text, n, "length") for one, text, n in zip(done, texts, counts, strict=True)]


def first_of(text: str, stop: Iterable[str]) -> int | None:
    """Where the first of some strings begins in a text, or None."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to a stop string; what may be the beginning of one waits for the next piece."""
    held = ""
    for piece in pieces:
        held += piece
        if (cut := first_of(held, stop)) is not None:
            yield held[:cut]
            return
        longest = max((n for one in stop for n in range(1, len(one)) if held.endswith(one[:n])), default=0)
        yield held[: len(held) - longest]
        held = held[len(held) - longest :]
    yield held
