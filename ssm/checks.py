"""Checks with errors that name the argument: run while tracing, they cost nothing afterwards."""

import numbers
from typing import Any

import jax


def check_shapes(**arguments: tuple[jax.Array | None, str]) -> dict[str, int]:
    """Checks arrays against axis names and returns the size of each axis.

        check_shapes(u=(u, "b l e"), B=(B, "b l n"))  ->  {"b": 2, "l": 5, "e": 8, "n": 4}

    Args:
      **arguments: for each argument its array and its axes, separated by blanks. An array of None is passed over.

    Raises:
      ValueError: an argument's shape disagrees with its axes, or with the size that an earlier argument gave an axis.
    """
    sizes: dict[str, int] = {}
    for name, (array, axes) in arguments.items():
        if array is None:
            continue
        letters = axes.split()
        known = ", ".join(f"{x}={sizes[x]}" for x in letters if x in sizes)
        expected = f"({', '.join(letters)})" + (f" with {known}" if known else "")
        agrees = len(array.shape) == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, array.shape, strict=True)
        )
        if not agrees:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    return sizes


def is_known_size(*sizes: Any) -> bool:
    """Whether sizes of axes are numbers, not symbols that become any number later (`jax.export.symbolic_shape`)."""
    return all(isinstance(size, int) for size in sizes)


def at_least(least: int, **options: int) -> None:
    """Raises a ValueError that names the first option below `least`."""
    for name, value in options.items():
        if not isinstance(value, numbers.Real) or value < least:
            raise ValueError(f"{name}={value!r}, expected at least {least}")


def inner_width(expand: float, d_model: int) -> int:
    """`expand` times a width as a whole number, also where `expand` is a quotient that was rounded."""
    return int(round(expand * d_model, 6))


def count_heads(width: int, head_dim: int, n_groups: int, *, most: int, named: str) -> int:
    """How many heads of head_dim channels make up a width.

    Args:
      width: 1 to `most`.
      head_dim: channels of a head.
      n_groups: groups of as many heads each.
      most: the width that there is room for.
      named: what an error calls the width.

    Raises:
      ValueError: a width out of range or that heads do not make up, or groups that heads do not.
    """
    if not 0 < width <= most or width % head_dim:
        raise ValueError(f"head_dim={head_dim} must divide {named}")
    n_heads = width // head_dim
    if n_heads % n_groups:
        raise ValueError(f"n_groups={n_groups} must divide the {n_heads} heads")
    return n_heads


def check_dt_range(dt_min: float, dt_max: float) -> None:
    """Raises a ValueError unless initial step sizes can be drawn from the range."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min={dt_min} and dt_max={dt_max}, expected 0 < dt_min <= dt_max")
