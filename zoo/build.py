"""Which model a config describes."""

from flax import nnx

from zoo.encoder import (
    MaskedLM,
    MaskedLMConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    TokenClassifier,
    TokenClassifierConfig,
)
from zoo.models import CausalLM, CausalLMConfig

Model = CausalLM | MaskedLM | SequenceClassifier | TokenClassifier
ModelConfig = CausalLMConfig | MaskedLMConfig | SequenceClassifierConfig | TokenClassifierConfig

MODELS: dict[type, type] = {
    CausalLMConfig: CausalLM,
    MaskedLMConfig: MaskedLM,
    SequenceClassifierConfig: SequenceClassifier,
    TokenClassifierConfig: TokenClassifier,
}


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """The model of a config, with fresh parameters from rngs' stream "params"."""
    return MODELS[type(config)](config, rngs=rngs)
