"""A tuned encoder in a published layout: its outputs mean there what its predictions mean here.

Classes get their names in config.json, where transformers looks for them. Numbers come out in the labels' own unit:
what the run kept as a mean and a spread goes into the classifier's weights. labels.json lies beside it for what no
published config says: how long rows are, which words stand for which class, that token classes are an answer's ends,
what the columns of texts were called.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.encoders.objectives import FILE_NAME, Target, load_target, save_target
from zoo.published.transformers_fields import named_classes

_PROBLEMS: dict[str, str] = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


def in_own_unit(model: Any, target: Target) -> Any:
    """A model whose output is the number itself, where its run scaled numbers; changed in place, others as they are."""
    if target.kind == "regression" and (target.mean, target.std) != (0.0, 1.0):
        linear = model.classifier
        kernel, bias = (p[...].astype(jnp.promote_types(p.dtype, jnp.float32)) for p in (linear.kernel, linear.bias))
        linear.kernel[...] = (kernel * target.std).astype(linear.kernel.dtype)
        linear.bias[...] = (bias * target.std + target.mean).astype(linear.bias.dtype)
    return model


def config_fields(target: Target, n_labels: int) -> dict[str, Any]:
    """What config.json says of a target's classes: nothing where the model's head has none of its own."""
    if not n_labels or target.head != "pooled":
        return {}
    problem = {"problem_type": _PROBLEMS[target.kind]} if target.kind in _PROBLEMS else {}
    return problem | (dict(named_classes(target.classes)) if len(target.classes) == n_labels else {})


def publish_target(source: Path, folder: Path) -> None:
    """Writes labels.json beside a model that `in_own_unit` gave, where the source has one."""
    if (source / FILE_NAME).is_file():
        save_target(dataclasses.replace(load_target(source), mean=0.0, std=1.0), folder)
