"""The configuration of contrastive training, and its presets."""

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
from experiments.vision_language.contrast import Kind


@dataclasses.dataclass(frozen=True)
class Config:
    """Two encoders, pairs of images and captions, and their training."""

    images: zoo.ImageClassifierConfig = zoo.ImageClassifierConfig(n_classes=0)
    """Shape of the encoder of images."""
    texts: zoo.SequenceClassifierConfig = zoo.SequenceClassifierConfig(pool="mean", pooler=False)
    """Shape of the encoder of texts. vocab_size 0 takes the tokenizer's."""
    d_embed: int = 512
    """Width of the space that both map to."""
    loss: Kind = "softmax"
    """softmax: the right text among those of the batch, and the other way round (CLIP). sigmoid: each pair (SigLIP)."""
    mini_batch: int | None = None
    """Rows that are encoded at once: the batch's loss and gradient stay the same, memory is that of a mini-batch. A
    divisor of --train.batch-size. None: the whole batch."""
    data: ImageTextsConfig = ImageTextsConfig(scene_kinds=("caption",))
    """Images and captions; questions and answers are left out."""
    tokenizer: str = "bpe"
    """bytes; bpe or wordpiece, trained on the captions; a tokenizer.json, or a folder or hub repository with one."""
    bpe_vocab_size: int = 1024
    """At most this many ids in a BPE or WordPiece that is trained here."""
    text_len: int | None = None
    """Most tokens of a caption; longer ones are cut. None: the longest."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """From an image to an array."""
    epochs: float | None = None
    """Passes over the pairs, instead of --steps."""
    warmup_fraction: float | None = None
    """Share of the steps that warm up, instead of --optim.warmup-steps."""
    seeds: tuple[int, ...] = ()
    """A run for each, in folders of their own, and the mean. None given: one run, of --train.seed."""
    threads: int = 4
    """Batches that are made at the same time, each by a thread."""
    train: TrainConfig = TrainConfig(batch_size=128)
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    run_dir: str | None = None
    """Folder of the run. None: runs/clip/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        check_duration(self)
        for name in ("threads", "d_embed", "bpe_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")
        size = self.train.batch_size
        if self.mini_batch is not None and (self.mini_batch < 1 or size % self.mini_batch):
            raise ValueError(f"--mini-batch {self.mini_batch} must divide --train.batch-size {size}")
        if self.train.accumulate > 1:
            raise ValueError(
                f"--train.accumulate {self.train.accumulate}: pairs compete for the whole batch; --mini-batch saves "
                "memory without changing the loss"
            )
        check_different(self.seeds)


def small_texts(d_model: int, **fields: Any) -> zoo.SequenceClassifierConfig:
    """A small encoder of captions, without positions and types: their mean is what it says."""
    options: dict[str, Any] = {"norm": "rms", "norm_place": "pre", "norm_eps": 1e-5, "max_len": None}
    options |= {"type_vocab_size": 0, "pool": "mean", "pooler": False}
    return zoo.SequenceClassifierConfig(d_model=d_model, **options, **fields)


def _tiny() -> Config:
    attn = zoo.AttentionConfig(n_heads=4, position="none", bias=True)
    images = zoo.ImageClassifierConfig(
        d_model=64,
        n_layers=3,
        n_classes=0,
        image_size=32,
        patch_size=8,
        class_token="none",
        pool="mean",
        attn=attn,
        mlp=zoo.MLPConfig(d_ff=128, gated=False, activation="gelu", bias=True),
    )
    mamba2 = ssm.Mamba2Config(head_dim=16, d_state=16)
    texts = small_texts(64, n_layers=2, pattern="mamba2", mamba2=mamba2)
    return Config(
        images=images,
        texts=texts,
        d_embed=64,
        warmup_fraction=0.1,
        train=TrainConfig(steps=500, batch_size=128, log_every=50, eval_every=250, save_every=250),
        optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, final_fraction=0.01),
    )


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "Attention over patches and Mamba-2 over captions of drawn scenes: no downloads, two minutes on two CPU cores.",
        _tiny(),
    ),
    "vit-small": (
        "A ViT-small and an M2-BERT of 80 M, for accelerators and --data.path; batches of 4,096.",
        Config(
            images=dataclasses.replace(zoo.presets["vit-small"], n_classes=0),  # type: ignore[arg-type]
            texts=zoo.SequenceClassifierConfig(
                **{
                    field.name: getattr(zoo.presets["m2-bert-80m"], field.name)
                    for field in dataclasses.fields(zoo.EncoderConfig)
                }
                | {"vocab_size": 0},
                pool="mean",
                pooler=False,
            ),
            loss="sigmoid",
            mini_batch=512,
            text_len=64,
            preprocess=PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            warmup_fraction=0.05,
            train=TrainConfig(steps=50_000, batch_size=4096, log_every=50, save_every=1000, eval_every=1000),
            optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, final_fraction=0.0),
        ),
    ),
}
# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("threads",)
