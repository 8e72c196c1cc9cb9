"""Rare classes that count as much as frequent ones in training."""

from typing import Literal

import numpy as np

from experiments.data.labelled import Kind
from experiments.encoders.objectives import LabelledRows

ClassWeights = Literal["none", "balanced"]


def balance(rows: LabelledRows, kind: Kind, n_classes: int) -> None:
    """Sets the rows' weights so that every class weighs the same over all of them, n / (n_classes * n of the class).

    Of several classes for a row, each one's rows that have it and rows that have it not weigh the same.

    Raises:
      ValueError: labels that are no classes.
    """
    if kind == "classification":
        labels = np.asarray(rows.arrays["labels"])
        rows.arrays["weights"] = weights_of(np.bincount(labels, minlength=n_classes))[labels]
    elif kind == "multi-label":
        there = np.asarray(rows.arrays["labels"], int)
        counts = np.stack([(there == 0).sum(axis=0), there.sum(axis=0)])  # 2 c
        weights = np.stack([weights_of(pair) for pair in counts.T])  # c 2
        rows.arrays["weights"] = np.take_along_axis(weights.T, there, axis=0)
    elif kind == "tagging":
        tags, counted = ([np.asarray(row) for row in rows.arrays[name]] for name in ("labels", "weights"))
        weights = weights_of(np.bincount(np.concatenate(tags), weights=np.concatenate(counted), minlength=n_classes))
        rows.arrays["weights"] = [weights[mine] * counts for mine, counts in zip(tags, counted, strict=True)]
    else:
        raise ValueError(f"--class-weights balanced counts classes; --kind {kind} has none")


def weights_of(counts: np.ndarray) -> np.ndarray:
    """The weight of each class by how often it occurs, as scikit-learn's "balanced"; 0 for one that does not."""
    counts = np.asarray(counts, float)
    return np.divide(counts.sum(), len(counts) * counts, out=np.zeros(len(counts)), where=counts > 0).astype(np.float32)
