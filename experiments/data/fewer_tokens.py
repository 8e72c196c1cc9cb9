"""A tokenizer of some of its tokens, in which every text is still written: a BPE of bytes, or one that falls to bytes.

A token of a BPE is made of two others, these of others, down to letters. So a token counts as often as the text made it
on the way to what it became, and the tokens that were made most often have all that they are made of among them:

    th + e -> the, the + re -> there        each "there" counts for "the", "th", "re" and its letters too

Merges stay where all three of their tokens do, in their order. So a text of which every token stayed has the same
tokens as before; of another, the tokens are those that were on the way.

Source: Ansell et al. 2023, arXiv:2306.01709, section 3 (BiStil: tokens that are seldom in a corpus go; here with the
merges that made them).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers as hf

from experiments.data.tokenizers import Tokenizer

Pair = tuple[str, str]


def most_frequent(tokenizer: Tokenizer, counts: np.ndarray, n: int) -> np.ndarray:
    """Ids of the tokens that stay: special ones, letters or bytes, and those that a text makes most often.

    Args:
      tokenizer: a BPE.
      counts: how often each id is in the text.
      n: how many stay, or fewer where others are never made.

    Returns:
      Rising ids, at most n.

    Raises:
      ValueError: another kind of tokenizer, or an n that cannot hold what every text may need, or is too large.
    """
    if tokenizer.kind == "bytes":
        raise ValueError(f"vocabulary={n}, but the model reads bytes, of which a text may need all")
    description = json.loads(tokenizer.to_json())
    if tokenizer.kind != "bpe":
        raise ValueError(f"vocabulary={n} with a {tokenizer.kind} tokenizer, expected a BPE")
    model = description["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"vocabulary={n} with a BPE of {name}={model[name]!r}, expected none")
    vocabulary: dict[str, int] = model["vocab"]
    special = {token["id"] for token in description["added_tokens"]} | {tokenizer.eot}
    letters = {i for token, i in vocabulary.items() if _is_letter(token, model)}
    there = special | set(vocabulary.values())
    if not len(special | letters) <= n <= len(there):
        raise ValueError(
            f"vocabulary={n}, expected {len(special | letters)} to {len(there)}: "
            f"{len(letters)} letters or bytes and {len(special - letters)} special tokens stay"
        )
    ranks: dict[Pair, int] = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    made_of = {token: _last_pair(token, ranks) for token in vocabulary}
    often = {token: int(counts[i]) if i < len(counts) else 0 for token, i in vocabulary.items()}
    for token in sorted(vocabulary, key=len, reverse=True):  # the longer one is never a part of the shorter one
        for part in made_of[token] or ():
            often[part] += often[token]
    others = [
        token
        for token, i in vocabulary.items()
        if i not in special | letters and (made_of[token] or len(token) == 1 or model.get("ignore_merges"))
    ]
    others.sort(key=lambda token: (-often[token], len(token), vocabulary[token]))
    chosen = special | letters
    return np.sort(np.asarray([*chosen, *(vocabulary[token] for token in others[: n - len(chosen)])]))


def with_tokens(tokenizer: hf.Tokenizer, ids: Sequence[int] | np.ndarray) -> hf.Tokenizer:
    """A BPE of some of its tokens, numbered in this order.

    Args:
      tokenizer: a BPE. It stays as it is.
      ids: from `most_frequent`.

    Raises:
      ValueError: tokens that the library numbers otherwise.
    """
    description, now = json.loads(tokenizer.to_str()), {int(old): new for new, old in enumerate(ids)}
    model = description["model"]
    model["vocab"] = {token: now[i] for token, i in model["vocab"].items() if i in now}
    model["merges"] = [
        pair for pair in model["merges"] if all(part in model["vocab"] for part in (*pair, "".join(pair)))
    ]
    description["added_tokens"] = [token | {"id": now[token["id"]]} for token in description["added_tokens"]]
    _renumber(description["post_processor"], now)
    smaller = hf.Tokenizer.from_str(json.dumps(description))
    before = tokenizer.get_vocab(with_added_tokens=True)
    for token, i in smaller.get_vocab(with_added_tokens=True).items():
        if now.get(before[token]) != i:
            raise ValueError(
                f"token {token!r}, {before[token]} so far, would be {i}, expected {now.get(before[token])}"
            )
    return smaller


def _is_letter(token: str, model: Mapping[str, Any]) -> bool:
    """Whether some text cannot be written without a token."""
    if token == model.get("unk_token"):
        return True
    if model.get("byte_fallback"):
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return len(token) == 1


def _last_pair(token: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The two tokens of which a BPE makes one, the last of its merges on the way; None where it does not."""
    parts, last = list(token), None
    while len(parts) > 1:
        pairs = [(parts[i], parts[i + 1]) for i in range(len(parts) - 1)]
        last = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if last not in ranks:
            return None
        place = pairs.index(last)
        parts[place : place + 2] = ["".join(last)]
    return last


def _renumber(processor: Any, now: Mapping[int, int]) -> None:
    """Writes new ids into a post-processor."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or ():
        _renumber(inner, now)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [now[i] for i in token["ids"]]
    for role in ("cls", "sep"):
        if role in processor:
            name, i = processor[role]
            processor[role] = [name, now[i]]
