"""Which model a config describes."""

from flax import nnx

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

Model = CausalLM | MaskedLM | SequenceClassifier | TokenClassifier | ImageClassifier
ModelConfig = CausalLMConfig | MaskedLMConfig | SequenceClassifierConfig | TokenClassifierConfig | ImageClassifierConfig

MODELS: dict[type, type] = {
    CausalLMConfig: CausalLM,
    MaskedLMConfig: MaskedLM,
    SequenceClassifierConfig: SequenceClassifier,
    TokenClassifierConfig: TokenClassifier,
    ImageClassifierConfig: ImageClassifier,
}


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """The model of a config, with fresh parameters from rngs' stream "params"."""
    return MODELS[type(config)](config, rngs=rngs)
