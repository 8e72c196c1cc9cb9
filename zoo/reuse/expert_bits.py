"""Experts of one mixture in different numbers of bits: those that many positions choose, or that rounding hurts, more.

    y of a mixture, in the mean:  sum over e of p_e E[(W_e x)^2 | x chose e]        p_e share of the choices that are e

So p_e tr(D_e^T H_e D_e) is what rounding expert e costs of it; `calibrate` gives p_e H_e. Experts in as many bits lie
in one array of codes, those of other bits in others.

Source: Yi et al. 2023, arXiv:2308.14352 (EdgeMoE), section 3.2 (bits by expert; there by the loss of accuracy when one
alone has fewer).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from zoo.reuse.codes import Bits, QuantizedWeight
from zoo.reuse.linear_maps import Axes, ComputedWeight


class QuantizedExperts(ComputedWeight):
    """The weights of a mixture's experts, each in its own number of bits."""

    undone_by = "zoo.dequantize"

    def __init__(
        self,
        weight: Float[Array, "e i o"],
        axes: Axes,
        *,
        bits: Sequence[Bits],
        group_size: int | None,
        moment: Float[Array, "e i i"] | None = None,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        """
        Args:
          weight, axes, group_size, moment, metadata: as of `QuantizedWeight`.
          bits: of each expert.

        Raises:
          ValueError: bits of another number of experts.
        """
        if len(bits) != weight.shape[0]:
            raise ValueError(f"bits={tuple(bits)}, expected those of {weight.shape[0]} experts")
        self.metadata, self.bits = tuple(sorted(metadata.items())), tuple(bits)
        groups = {b: np.flatnonzero(np.array(bits) == b) for b in sorted(set(bits))}
        self.parts = nnx.List(
            [
                QuantizedWeight(
                    weight[experts],
                    axes,
                    bits=b,
                    group_size=group_size,
                    moment=None if moment is None else moment[experts],
                )
                for b, experts in groups.items()
            ]
        )
        self.group_size = self.parts[0].group_size
        # Where each expert is among those of the parts, one after the other.
        self.order = tuple(np.argsort(np.concatenate([*groups.values()])).tolist())

    def whole(self) -> Array:
        return jnp.concatenate([part.whole() for part in self.parts])[np.array(self.order)]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return sum(part.nbytes for part in self.parts)
