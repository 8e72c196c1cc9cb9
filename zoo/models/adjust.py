"""A trained model run in another way: on fewer of its positions, or one block after the other."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from zoo.models.build import Model, abstract
from zoo.models.frozen import copied
from zoo.stack.backbone import Backbone


def with_keep(model: Model, keep: Sequence[float] | None) -> Model:
    """A model whose blocks take other shares of the positions. Its arrays are shared, not copied.

    Args:
      model: an encoder of text, or of images with mixers that need no grid.
      keep: `BackboneConfig.keep`, a share behind each block but the last. None: all positions.

    Raises:
      ValueError: shares that are none, or a model that looks one way.

    Examples:
      >>> model = zoo.create("m2-bert-80m", rngs=0, d_model=16, n_layers=3, vocab_size=32)
      >>> zoo.with_keep(model, (0.5, 0.25))(jnp.ones((2, 8), jnp.int32)).shape
      (2, 8, 32)
    """
    config: Any = model.config
    changed: Any = dataclasses.replace(config, keep=None if keep is None else tuple(map(float, keep)))
    graphdef, *_ = nnx.split(abstract(changed))
    return copied(nnx.merge(graphdef, nnx.state(model)))


def run_layer_by_layer(model: nnx.Module) -> None:
    """Has each block of a model run by itself, where it was in a loop or recomputed: what they compute stays the same.

    Args:
      model: it is changed, its config is not.
    """
    plain: dict[str, Any] = {"remat": False, "remat_rounds": False, "remat_positions": None, "scan_layers": False}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Backbone):
            module.config = dataclasses.replace(module.config, **plain)
