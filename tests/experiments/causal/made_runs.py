"""Folders of causal language models, as `causal_lm` leaves them, without any training."""

from pathlib import Path
from typing import Any

from flax import nnx

import zoo
from experiments import causal_lm
from experiments.data.corpus import DataConfig
from experiments.data.tokenizers import ByteTokenizer, save_tokenizer
from experiments.loop import flags
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import split_model
from m2 import HyenaFilterConfig, M2Config


def write_run(folder: Path, pattern: str = "mamba", **fields: Any) -> zoo.CausalLM:
    """A run's folder whose model has fresh parameters, on bytes; and that model."""
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "attn": zoo.AttentionConfig(n_heads=2)}
    shape |= {"m2": M2Config(l_max=8, filter=HyenaFilterConfig(order=8))}
    config = causal_lm.Config(
        model=zoo.CausalLMConfig(**shape, pattern=pattern, **fields), data=DataConfig(tokenizer="bytes")
    )
    tokenizer = ByteTokenizer()
    save_tokenizer(tokenizer, folder)
    flags.save_config(config, folder / "config.json")
    model = zoo.CausalLM(causal_lm.fit_vocabulary(config, tokenizer).model, rngs=nnx.Rngs(0))
    with Checkpoints(folder) as run:
        run.save(1, {"params": split_model(model)[1]}, data_state={})
    return model
