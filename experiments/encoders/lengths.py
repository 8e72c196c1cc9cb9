"""How long the rows are that an encoder reads, and one that reads longer ones."""

from typing import Any

import zoo
from experiments.loop import runs
from zoo.stack.pattern import mixer_name, pattern_mixers


def check_lengths(model: zoo.EncoderConfig, length: int, flag: str = "--data.seq-len") -> None:
    """Raises a ValueError where rows of this length are longer than the model can read."""
    if model.max_len is not None and length > model.max_len:
        raise ValueError(f"{flag} {length} with --model.max-len {model.max_len}: there are no more positions")
    runs.check_filters(model, length, flag)


def reach(model: Any, length: int) -> Any:
    """A model that reads `length` positions: itself, or with longer tables where they are too short."""
    try:
        check_lengths(model.config, length)
    except ValueError:
        return zoo.extend_positions(model, length)
    return model


def longest(config: zoo.EncoderConfig) -> int | None:
    """The most tokens that a model reads in a row, None where there is no bound."""
    lengths = [] if config.max_len is None else [config.max_len]
    if "m2" in map(mixer_name, pattern_mixers(config.pattern, config.n_layers)):
        lengths.append(config.m2.l_max)
    return min(lengths, default=None)
