"""An image encoder's first lesson: which caption belongs to which picture, before a language model reads its patches.

A vision-language model whose encoder knows nothing learns to see through its language model's answers, a few tokens
a row; one that has been told captions apart sees after a fraction of the steps. `experiments.clip` teaches it, beside
one block of attention over the captions, which is put away afterwards.
"""

import dataclasses

import zoo
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig
from experiments.vision_language import contrast_presets, presets

BATCH_SIZE = 128
LEARNING_RATE = 3e-3


def lesson(config: presets.Config) -> contrast_presets.Config:
    """The run of experiments.clip that teaches a configuration's image encoder, on the captions of its data."""
    vision = config.model.vision
    d_model = vision.d_model
    attn, mlp = zoo.AttentionConfig(n_heads=max(1, d_model // 16)), zoo.MLPConfig(d_ff=2 * d_model)
    texts = contrast_presets.small_texts(d_model, n_layers=1, pattern="attn/mlp", attn=attn, mlp=mlp)
    steps = config.encoder_steps
    return contrast_presets.Config(
        images=vision,
        texts=texts,
        d_embed=d_model,
        data=dataclasses.replace(config.data, scene_kinds=("caption",)),
        tokenizer=config.tokenizer,
        bpe_vocab_size=config.bpe_vocab_size,
        preprocess=config.preprocess,
        warmup_fraction=0.1,
        threads=config.threads,
        train=TrainConfig(
            steps=steps,
            batch_size=BATCH_SIZE,
            seed=config.train.seed,
            log_every=50,
            eval_every=steps,
            save_every=steps,
            keep_last=1,
            tensorboard=config.train.tensorboard,
        ),
        optim=OptimConfig(learning_rate=LEARNING_RATE, weight_decay=0.05, final_fraction=0.01),
        mesh=config.mesh,
    )
