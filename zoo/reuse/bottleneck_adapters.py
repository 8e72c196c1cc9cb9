"""Bottleneck adapters: small maps behind the mixers of a trained model, which alone are trained.

Unlike low-rank adapters they are layers of their own, with a non-linearity, and cannot be folded into the weights.

Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1.
"""

import dataclasses
from typing import cast

from flax import nnx

from zoo.layers.rngs import Seed
from zoo.models.build import Model, build
from zoo.models.frozen import freeze
from zoo.models.vision_language import VisionLanguageModel
from zoo.reuse.linear_maps import named, require_plain

_PARTS = (".adapter.", ".adapter2.")


def add_adapters(model: Model, *, width: int = 16, trained: str | None = None, rngs: Seed) -> Model:
    """A model that computes the same as the one given, and trains a bottleneck behind each of its mixers alone.

    Everything else is frozen, that is no `nnx.Param`: it has no gradient and no optimiser state.

    Args:
      model: any of the zoo's, without such adapters. It stays as it is; frozen arrays are shared.
      width: channels in the middle of a bottleneck, which has 2 width d_model parameters.
      trained: names of parameters that are trained as they are, as of `add_lora`.
      rngs: stream "params", or a seed.

    Returns:
      A model of the same kind, whose config says `adapter_width`: it is saved and loaded as any other.

    Raises:
      ValueError: width below 1; a model that has adapters, is quantised, or is made of two; nothing that `trained`
        names.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> adapted = zoo.add_adapters(model, width=4, rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(adapted(jnp.ones((1, 3), jnp.int32)), model(jnp.ones((1, 3), jnp.int32))))
      True
    """
    if isinstance(model, VisionLanguageModel):
        raise ValueError("model reads images and text: expected its language model, which `around` puts back")
    if model.config.adapter_width is not None:
        raise ValueError(f"model has adapters of width {model.config.adapter_width} already")
    require_plain(model)
    config = dataclasses.replace(model.config, adapter_width=width)
    given = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    names = [".".join(map(str, path)) for path in given]
    kept = set() if trained is None else set(named("trained", trained, names))
    adapted = build(config, rngs=rngs)
    nnx.update(adapted, nnx.state(model))
    return cast(Model, freeze(adapted, lambda name: name in kept or any(part in name for part in _PARTS)))
