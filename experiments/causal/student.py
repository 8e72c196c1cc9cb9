"""What a student of an attention model is, and how it learns: flags that every distillation has.

Source of the defaults: Liao et al. 2025, arXiv:2502.13145 (mmMamba).
"""

import dataclasses
from typing import Annotated, Literal

import ssm
import zoo
from experiments.loop import flags
from experiments.loop.optim import OptimConfig, Schedule
from experiments.loop.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the distillation."""

    steps: int = 1000
    """Optimiser steps. 0 leaves the stage out."""
    learning_rate: float = 1e-3
    """Peak learning rate."""

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class MixerConfig(ssm.LinearAttentionConfig):
    """Options of linear_attn that the teacher leaves open."""

    n_heads: Annotated[int | None, flags.Hidden] = None
    n_kv_heads: Annotated[int | None, flags.Hidden] = None
    head_dim: Annotated[int | None, flags.Hidden] = None
    bias: Annotated[bool, flags.Hidden] = False
    init: Annotated[Literal["mamba2", "mimic"], flags.Hidden] = "mamba2"

    @property
    def options(self) -> ssm.LinearAttentionConfig:
        """The same as the mixer takes them."""
        return ssm.LinearAttentionConfig(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class LoopConfig(TrainConfig):
    """How often to look, and what to keep, in every stage."""

    steps: Annotated[int, flags.Hidden] = 1000
    ema: Annotated[float, flags.Hidden] = 0.0
    carry_state: Annotated[bool, flags.Hidden] = False


@dataclasses.dataclass(frozen=True)
class StageOptimConfig(OptimConfig):
    """The optimiser, of every stage. The defaults are mmMamba's."""

    learning_rate: Annotated[float, flags.Hidden] = 1e-3
    warmup_steps: Annotated[int, flags.Hidden] = 0
    schedule: Schedule = "trapezoid"
    """How the learning rate falls from its peak. trapezoid: not at all until the last tenth of the steps."""
    final_fraction: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.05
    """Decoupled weight decay, times the learning rate, of what is trained."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    clip: float = 5.0
    """Largest norm of the whole gradient; longer ones are scaled down. 0 switches clipping off."""


def chosen_layers(pattern: str, model: zoo.CausalLMConfig) -> list[int]:
    """The teacher's layers of attention that a pattern makes linear attention.

    Raises:
      ValueError: the pattern has other words, or none of linear attention.
    """
    words = zoo.parse_pattern(pattern, model.n_layers)
    if any(word not in (zoo.Word(("attn",)), zoo.Word(("linear_attn",))) for word in words):
        raise ValueError(f"--pattern {pattern!r}, expected the words attn and linear_attn, their options by --mixer")
    there = zoo.parse_pattern(model.pattern, model.n_layers)
    layers = [
        i
        for i, (now, then) in enumerate(zip(there, words, strict=True))
        if now.plain.mixers == ("attn",) and then.mixers == ("linear_attn",)
    ]
    if not layers:
        raise ValueError(f"--pattern {pattern!r} converts none of the teacher's layers, {model.pattern!r}")
    return layers
