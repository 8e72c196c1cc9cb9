"""How many floating-point operations a step of a model takes, by `zoo.models.flops`: matrix products and attention."""

from typing import Any

import zoo
from experiments.aot.steps import What, batch_of
from zoo.models.build import ModelConfig, abstract
from zoo.models.flops import depth_flops, forward_flops, weights_met


def step_flops(config: ModelConfig, what: What, batch_size: int, seq_len: int = 0) -> float:
    """Operations of a step over all devices; what remat does again is not counted.

    Args:
      config: of a causal or masked language model, or of an image classifier.
      what, batch_size, seq_len: as in `make_step`.
    """
    model: Any = abstract(config)
    times = 3 if what == "train" else 1  # gradients in what goes in and in the weights
    if isinstance(config, zoo.CausalLMConfig):
        return times * batch_size * (1 if what == "decode" else seq_len) * forward_flops(model, seq_len)
    if isinstance(config, zoo.ImageClassifierConfig):
        patches = config.grid[0] * config.grid[1]
        length, embedding = patches + config.n_tokens, 2 * weights_met(model.patch_embedding) * patches
        classifiers = [part for part in (model.classifier, model.distillation_classifier) if part is not None]
        more = embedding + sum(2 * weights_met(part) for part in classifiers)
        backbone = model.backbone
    else:
        # The head reads the positions that are to be guessed, in training, and otherwise all.
        read = batch_of(config, 1, seq_len)["positions"].shape[1] if what == "train" else seq_len
        vocabulary = config.padded_vocab_size * config.d_model
        length, more = seq_len, 2 * (weights_met(model.dense) + vocabulary) * read
        backbone = model.encoder.backbone
    depths = range(len(backbone.words))
    return times * batch_size * (more + length * sum(depth_flops(backbone, depth, length) for depth in depths))
