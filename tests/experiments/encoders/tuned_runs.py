"""Folders of tuned encoders, as `finetune` leaves them, without any training."""

import dataclasses
from pathlib import Path

from flax import nnx

import zoo
from experiments.data.tokenizers import save_tokenizer, train_wordpiece
from experiments.encoders.objectives import Target, make_objective, save_target
from experiments.loop import runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import split_model
from zoo.models.build import build

SHAPE = zoo.MaskedLMConfig(
    d_model=16,
    n_layers=1,
    pattern="attn/mlp",
    max_len=32,
    attn=zoo.AttentionConfig(n_heads=2, position="none", bias=True),
    mlp=zoo.MLPConfig(d_ff=16, gated=False, activation="gelu", bias=True),
)


def write_tuned(folder: Path, target: Target, shape: zoo.EncoderConfig = SHAPE, *, pool: str = "first") -> Path:
    """A run's folder whose model has fresh parameters."""
    tokenizer = train_wordpiece(["the cat sat here . what is this ? yes no"] * 3, 300)
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    config = make_objective(target, tokenizer).config(shape, pool=pool, dropout=0.0)
    folder.mkdir(parents=True)
    save_tokenizer(tokenizer, folder)
    runs.save_model_config(config, folder)
    save_target(target, folder)
    with Checkpoints(folder) as run:
        run.save(1, {"params": split_model(build(config, rngs=nnx.Rngs(0)))[1]}, data_state={})
    return folder
