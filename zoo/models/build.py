"""Which model a config describes."""

import dataclasses
from typing import TypeVar

from flax import nnx

from zoo.layers.rngs import Seed
from zoo.models.causal import CausalLM, CausalLMConfig
from zoo.models.encoder_heads import (
    MaskedLM,
    MaskedLMConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    TokenClassifier,
    TokenClassifierConfig,
)
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from zoo.stack.backbone_config import BackboneConfig

Model = CausalLM | MaskedLM | SequenceClassifier | TokenClassifier | ImageClassifier | VisionLanguageModel
ModelConfig = (
    CausalLMConfig
    | MaskedLMConfig
    | SequenceClassifierConfig
    | TokenClassifierConfig
    | ImageClassifierConfig
    | VisionLanguageConfig
)

Kind = TypeVar("Kind", bound=Model)
Config = TypeVar("Config", bound=ModelConfig)

MODELS: dict[type, type] = {
    CausalLMConfig: CausalLM,
    MaskedLMConfig: MaskedLM,
    SequenceClassifierConfig: SequenceClassifier,
    TokenClassifierConfig: TokenClassifier,
    ImageClassifierConfig: ImageClassifier,
    VisionLanguageConfig: VisionLanguageModel,
}


def stacks_of(config: ModelConfig) -> dict[str, BackboneConfig]:
    """The stacks of blocks that a config describes, by the name of their part; "" is that of the whole config."""
    if isinstance(config, VisionLanguageConfig):
        return {"vision": config.vision, "text": config.text}
    return {"": config}


def in_dtype(config: Config, dtype: str) -> Config:
    """A config of parameters and computation in a dtype, by its name."""
    fields: dict = {"dtype": dtype, "param_dtype": dtype}
    if isinstance(config, VisionLanguageConfig):
        fields = {name: dataclasses.replace(part, **fields) for name, part in stacks_of(config).items()}
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def require_kind(kind: type | None, config: ModelConfig, named: str) -> None:
    """Raises a ValueError unless a config describes a model of a kind; None is any.

    Args:
      kind: a class of models.
      config: what describes the model.
      named: what the error calls it.
    """
    found = MODELS[type(config)]
    if kind is not None and not issubclass(found, kind):
        raise ValueError(f"{named} is a {found.__name__}, expected kind={kind.__name__}")


def build(config: ModelConfig, *, rngs: Seed) -> Model:
    """The model of a config, with fresh parameters from rngs' stream "params", or of a seed."""
    return MODELS[type(config)](config, rngs=rngs)


def abstract(config: ModelConfig) -> Model:
    """The model of a config with shapes in place of arrays, as `nnx.eval_shape` gives it; nothing is computed.

    It takes the time of the number of blocks, where `nnx.Rngs` under a trace takes that of its square: to count a key
    it searches all that was traced before.
    """
    return nnx.eval_shape(lambda: build(config, rngs=_same_keys()))


class _SameKey(nnx.RngStream):
    """Gives one key again and again, which is as good as any where no number is drawn."""

    def __call__(self):
        return self.key[...]


def _same_keys() -> nnx.Rngs:
    rngs = nnx.Rngs(0)
    rngs.default = _SameKey(0, tag="default")  # type: ignore[attr-defined]
    return rngs
