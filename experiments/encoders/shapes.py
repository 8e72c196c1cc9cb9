"""Shapes of encoders, whatever their head: the part of a configuration that says it, and small ones."""

import dataclasses
from typing import Any

import ssm
import zoo
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig


def encoder_fields(config: zoo.EncoderConfig) -> dict[str, Any]:
    """The fields of an encoder, whatever its head."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(zoo.EncoderConfig)}


def encoder_config(config: zoo.EncoderConfig) -> zoo.EncoderConfig:
    """The part of a model's configuration that any head has."""
    return zoo.EncoderConfig(**encoder_fields(config))


def small_encoder(d_model: int, n_layers: int, length: int) -> zoo.MaskedLMConfig:
    """A small pre-norm encoder for m2/monarch, mamba, mamba2 or attn/mlp: of about equal size, swapped by one flag.

    Positions come from the mixers themselves (rotary embedding, convolutions, states), so that a model trained at one
    length reads others.
    """
    return zoo.MaskedLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="m2/monarch",
        norm="layer",
        norm_place="pre",
        norm_eps=1e-6,
        max_len=None,
        m2=M2Config(l_max=length, residual_long_conv=True, filter=HyenaFilterConfig(order=32)),
        monarch=MonarchMLPConfig(n_blocks=2, d_ff=39 * d_model // 8),
        mamba=ssm.MambaConfig(d_state=8),
        mamba2=ssm.Mamba2Config(d_state=32, head_dim=32),
        attn=zoo.AttentionConfig(head_dim=32),
        mlp=zoo.MLPConfig(activation="gelu", d_ff=25 * d_model // 8),
    )
