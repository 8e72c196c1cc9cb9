"""The scales of norms where channels go, so that those that stay are as large behind them as they were."""

from typing import Any

import numpy as np
from flax import nnx

from zoo.models.build import Model
from zoo.reuse.calibration import Moments
from zoo.reuse.widths import Axes, Axis, Kept, Path, places_on

_NOTHING = Axis(())


def norm_factors(model: Model, axes: dict[Path, Axes], moments: Moments, kept: Kept) -> dict[Path, np.ndarray]:
    """What the scales of norms are multiplied by, so that the channels that stay are as large as they were.

    The mean square is over fewer channels, which have most of the whole: c = sqrt(their share of it n / n'), in each
    group that is normalised by itself.
    """
    shares: dict[Path, np.ndarray | None] = {}
    stay: dict[Path, np.ndarray] = {}
    for place, module in nnx.iter_modules(model):
        of: Any = module
        path = (*place, "scale")
        spans = axes[path][0].spans if path in axes and str(place[-1:]).startswith("('norm") else ()
        if not any(span.width in kept for span in spans):
            continue
        (axis,), scale = axes[path], np.asarray(of.scale[...], np.float64)
        where = np.zeros(len(scale), bool)
        where[places_on(axis, kept, 1)] = True
        groups = (-1, getattr(module, "group_size", None) or len(scale))
        stay[path] = where.reshape(groups)
        energy = _read_behind(place, axis, axes, moments)
        if energy is None:
            shares[path] = None
            continue
        parts = (energy / np.where(scale == 0, 1, scale) ** 2).reshape(groups)
        shares[path] = (parts * stay[path]).sum(1) / np.maximum(parts.sum(1), 1e-30)
    # Behind the last norm is the head, which is not among what was seen: as the others are in the mean.
    known = [share for path, share in shares.items() if share is not None and len(stay[path]) == 1]
    mean = np.mean(known, axis=0) if known else np.ones(1)
    factors = {}
    for path, where in stay.items():
        share, n = shares[path], where.size // len(where)
        left = where.sum(1)
        square = (mean if share is None else share) * n / np.maximum(left, 1)
        factors[path] = np.repeat(np.where(left == 0, 1.0, np.sqrt(square)), n)
    return factors


def _read_behind(place: Path, axis: Axis, axes: dict[Path, Axes], moments: Moments) -> np.ndarray | None:
    """The mean squares of what a norm gives, read off the moments of a map behind it; None where none was seen."""
    widths_here = {span.width for span in axis.spans}
    around, behind = place[:-1], {"norm": "mixer", "norm2": "mlp"}.get(str(place[-1]), "")
    inside = around if "mixer" in around else (*around, behind)  # a mixer's own, perhaps of one of two side by side
    for path, found in axes.items():
        name = ".".join(map(str, path))
        if path[: len(inside)] != inside or name not in moments or "norm_f" in place:
            continue
        read = next((one for one in found if one.read), _NOTHING)
        if widths_here <= {span.width for span in read.spans}:
            diagonal = np.diagonal(np.asarray(moments[name], np.float64), axis1=-2, axis2=-1)
            whole = diagonal.ravel() if read.spans[0].rows is not None else np.atleast_2d(diagonal).mean(axis=0)
            return whole[-axis.size :]
    return None
