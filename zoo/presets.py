"""Published models by name, each with the source of its numbers."""

import dataclasses

from flax import nnx

from zoo.models import CausalLM, CausalLMConfig
from zoo.names import unknown_name


def _mamba(d_model: int, n_layers: int) -> CausalLMConfig:
    # Source: the config.json of state-spaces/mamba-{130m,370m,790m,1.4b,2.8b}: the 50,277 tokens of GPT-NeoX in 50,280
    # rows, tied; everything else is the mixer's default. Gu & Dao 2023, arXiv:2312.00752, table 12.
    return CausalLMConfig(d_model=d_model, n_layers=n_layers, pattern="mamba", vocab_size=50_277, pad_vocab_multiple=8)


presets: dict[str, CausalLMConfig] = {
    "mamba-130m": _mamba(768, 24),
    "mamba-370m": _mamba(1024, 48),
    "mamba-790m": _mamba(1536, 48),
    "mamba-1.4b": _mamba(2048, 48),
    "mamba-2.8b": _mamba(2560, 64),
}


def create(name: str, *, rngs: nnx.Rngs, **overrides) -> CausalLM:
    """Builds a preset's model with fresh parameters.

        create("mamba-130m", rngs=nnx.Rngs(0), n_layers=2, dtype="bfloat16")

    Args:
      name: a key of `presets`.
      rngs: source of keys, stream "params".
      **overrides: fields of the preset's config to replace.

    Raises:
      ValueError: an unknown preset or field (naming the nearest known one), or a value that the config rejects.
    """
    if name not in presets:
        raise ValueError(unknown_name("preset", name, presets))
    fields = {field.name for field in dataclasses.fields(presets[name])}
    for field in overrides.keys() - fields:
        raise ValueError(unknown_name("config field", field, fields))
    return CausalLM(dataclasses.replace(presets[name], **overrides), rngs=rngs)
