"""The configuration of a vision-language model's training, and its presets."""

import dataclasses
from typing import Any

import ssm
import zoo
from experiments.data.augment import PreprocessConfig
from experiments.data.image_texts import ImageTextsConfig
from experiments.loop.duration import check_duration
from experiments.loop.mesh import MeshConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.seeds import check_different
from experiments.loop.train import TrainConfig
from experiments.vision_language.stages import Trained


@dataclasses.dataclass(frozen=True)
class Config:
    """A vision-language model: its shape, its images and texts, its training."""

    model: zoo.VisionLanguageConfig = zoo.VisionLanguageConfig()
    """Shape of the model. text.vocab_size 0 takes the tokenizer's, and one more for the images' places."""
    data: ImageTextsConfig = ImageTextsConfig()
    """Images and texts."""
    tokenizer: str = "bpe"
    """bytes; bpe or wordpiece, trained on the texts; a tokenizer.json, or a folder or hub repository with one. With
    --init or --language-init theirs."""
    bpe_vocab_size: int = 1024
    """At most this many ids in a BPE or WordPiece that is trained here."""
    text_len: int | None = None
    """Most tokens of a question and its answer; longer ones are left out. None: the longest."""
    trained: Trained = "all"
    """What this stage trains: connector, and nothing else; language, the connector and the language model; or all."""
    init: str | None = None
    """A run of this command, or a folder in our own layout: the stage goes on from its model, whose shape replaces
    --model."""
    vision_init: str | None = None
    """A run, a published folder or a hub name of an image classifier: the encoder starts from it."""
    encoder_steps: int = 0
    """Steps of experiments.clip in which a fresh encoder first learns which caption is whose, in RUN/encoder."""
    language_init: str | None = None
    """A run, a published folder or a hub name of a causal language model, whose tokenizer is taken too."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """From an image to an array."""
    epochs: float | None = None
    """Passes over the examples, instead of --steps."""
    warmup_fraction: float | None = None
    """Share of the steps that warm up, instead of --optim.warmup-steps."""
    seeds: tuple[int, ...] = ()
    """A run for each, in folders of their own, and the mean. None given: one run, of --train.seed."""
    threads: int = 4
    """Batches that are made at the same time, each by a thread."""
    pictures: int = 16
    """Pictures in predictions.png."""
    train: TrainConfig = TrainConfig(batch_size=64)
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    run_dir: str | None = None
    """Folder of the run. None: runs/vlm/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        check_duration(self)
        for name in ("threads", "pictures", "bpe_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")
        if self.text_len is not None and self.text_len < 2:
            raise ValueError(f"--text-len {self.text_len}, expected at least 2")
        if self.init and (self.vision_init or self.language_init):
            raise ValueError("--init is a whole model, expected no --vision-init and no --language-init beside it")
        if self.encoder_steps < 0:
            raise ValueError(f"--encoder-steps {self.encoder_steps}, expected at least 0")
        check_different(self.seeds)


def small(d_model: int, n_layers: int, image_size: int, patch_size: int, **fields: Any) -> zoo.VisionLanguageConfig:
    """A small model for attn/mlp, mamba2 or "mamba2 attn/mlp": blocks of about equal size, by --model.text.pattern."""
    heads = d_model // 16
    vision = zoo.ImageClassifierConfig(
        d_model=d_model,
        n_layers=2,
        n_classes=0,
        image_size=image_size,
        patch_size=patch_size,
        class_token="none",
        pool="mean",
        attn=zoo.AttentionConfig(n_heads=heads, position="none", bias=True),
        mlp=zoo.MLPConfig(d_ff=2 * d_model, gated=False, activation="gelu", bias=True),
    )
    text = zoo.CausalLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        pattern="mamba2",
        attn=zoo.AttentionConfig(n_heads=heads),
        mlp=zoo.MLPConfig(d_ff=d_model),
        mamba2=ssm.Mamba2Config(head_dim=16, d_state=32, expand=2.0),
    )
    options: dict[str, Any] = {"vision": vision, "text": text, **fields}
    return zoo.VisionLanguageConfig(**options)


def _with_pattern(model: zoo.VisionLanguageConfig, pattern: str) -> zoo.VisionLanguageConfig:
    return dataclasses.replace(model, text=dataclasses.replace(model.text, pattern=pattern))


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "Attention reads drawn scenes of 32 x 32 pixels, after a lesson for its eyes: no downloads, two minutes.",
        Config(
            model=_with_pattern(small(64, 2, 32, 8), "attn/mlp"),
            data=ImageTextsConfig(scenes=10_000, scene_kinds=("caption", "shape", "colour", "place")),
            encoder_steps=400,
            trained="language",
            warmup_fraction=0.1,
            train=TrainConfig(steps=1200, batch_size=32, log_every=100, eval_every=400, save_every=400),
            optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, final_fraction=0.01),
        ),
    ),
    "scenes": (
        "Mamba-2 learns to see by its answers alone: a patch for each place, all kinds of questions, seven minutes.",
        Config(
            model=small(64, 3, 32, 16),
            warmup_fraction=0.1,
            train=TrainConfig(steps=2600, batch_size=64, log_every=100, eval_every=650, save_every=1300),
            optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, final_fraction=0.01),
        ),
    ),
    "mamba2-130m": (
        "A ViT-small and a Mamba-2 of 130 M, for accelerators; --vision-init and --language-init bring their weights.",
        Config(
            model=zoo.VisionLanguageConfig(
                vision=dataclasses.replace(zoo.presets["vit-small"], n_classes=0, drop_path=0.0),  # type: ignore[arg-type]
                text=dataclasses.replace(zoo.presets["mamba2-130m"], vocab_size=0),  # type: ignore[arg-type]
                connector=zoo.ConnectorConfig(kind="scan", depth=3, gated=True),
            ),
            preprocess=PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            warmup_fraction=0.03,
            train=TrainConfig(steps=10_000, batch_size=128, log_every=50, save_every=1000, eval_every=1000),
            optim=OptimConfig(learning_rate=2e-5, weight_decay=0.1, final_fraction=0.0),
        ),
    ),
}
# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("threads", "pictures")
