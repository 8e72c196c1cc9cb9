"""Weights are numbers: floating point, not codes of quantised ones, and finite in the dtype that they are loaded in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from zoo.published.tensors import Json

# What configs say of weights that stand for others. The second is that of compressed-tensors before its first.
_QUANTISED = ("quantization_config", "compression_config")
# By the bytes of a float, its bits as a whole number with a sign. An exponent of ones is infinity or no number.
_BITS = {2: np.int16, 4: np.int32, 8: np.int64}


def require_plain_config(raw: Json) -> None:
    """Raises a ValueError where a config says that weights are quantised."""
    for name in _QUANTISED:
        if raw.get(name) is not None:
            said = raw[name].get("quant_method") if isinstance(raw[name], dict) else raw[name]
            how = f" ({said!r:.40})" if said else ""
            raise ValueError(f"{name}: the weights are quantised{how}, which is not supported, only plain weights")


def require_floating(place: Path, tensors: Mapping[str, Any], names: Any) -> None:
    """Raises a ValueError that names the first of some tensors whose values are no floating-point numbers."""
    for name in names:
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise ValueError(
                f"{place}: {name} is {tensors[name].dtype}, expected floating point: codes of quantised weights are "
                "not supported, only plain weights"
            )


def copied(array: np.ndarray, dtype: Dtype, named: str, *, allow_nonfinite: bool) -> np.ndarray:
    """An array of one's own in a dtype.

    Args:
      array: values, perhaps in a mapped file.
      dtype: of the copy.
      named: what errors call it.
      allow_nonfinite: whether infinities and what is not a number go through.

    Raises:
      ValueError: some values are not finite, or not in this dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        copy = np.array(array, dtype, order="C")
    if allow_nonfinite or is_finite(copy):
        return copy
    wrong = ~np.isfinite(array.astype(np.float64))
    if count := int(wrong.sum()):
        raise ValueError(
            f"{named} holds {count:,} of {array.size:,} values that are infinite or not a number; "
            "allow_nonfinite=True (of sample and convert: --allow-nonfinite) loads them all the same"
        )
    largest = float(np.abs(array.astype(np.float64)).max())
    raise ValueError(f"{named} holds {largest:.3g}, which is infinite in {copy.dtype}; load it in another dtype")


def is_finite(array: np.ndarray) -> bool:
    """Whether all values of floating point, in C order, are finite, in two passes over their bits."""
    if not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    if array.dtype.itemsize not in _BITS:
        return bool(np.isfinite(array.astype(np.float32)).all())
    signed = _BITS[array.dtype.itemsize]
    exponent = np.array(jnp.inf, array.dtype).view(signed)
    bits = array.reshape(-1).view(signed)
    # Those with a sign are the numbers below zero, the smaller the nearer to -0: seen without one, the largest is.
    unsigned = np.dtype(signed).str.replace("i", "u")
    return bool(bits.max() < exponent and bits.view(unsigned).max() < np.array(-jnp.inf, array.dtype).view(unsigned))
