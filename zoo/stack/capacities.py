"""How much of a row each block of a stack takes, fewer positions with depth: p-MoD's schedule.

Source: Zhang et al. 2024, arXiv:2412.04449, section 3.3 (progressive ratio decay, a shifted cosine).
"""

import math


def cosine_capacities(
    n_layers: int, shift: float = 0.5, *, dense_above: float = 0.85, least: float = 0.15
) -> tuple[float | None, ...]:
    """The share of the positions of each block; None where it takes all.

        cos(pi i / (n_layers - 1)) / 2 + shift, for block i from 0

    Args:
      n_layers: blocks.
      shift: the mean share, nearly.
      dense_above: blocks whose share would be larger take all.
      least: the smallest share.

    Raises:
      ValueError: n_layers below 1, or a least share that is none.

    Examples:
      >>> zoo.cosine_capacities(5)
      (None, None, 0.5, 0.15, 0.15)
    """
    if n_layers < 1:
        raise ValueError(f"n_layers={n_layers}, expected at least 1")
    if not 0 < least <= 1:
        raise ValueError(f"least={least}, expected more than 0, at most 1")
    shares = [math.cos(math.pi * i / max(1, n_layers - 1)) / 2 + shift for i in range(n_layers)]
    return tuple(None if share > dense_above else round(max(share, least), 4) for share in shares)
