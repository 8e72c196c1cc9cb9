"""The configuration of an image classifier's training, and its presets."""

import dataclasses
from typing import Any

import ssm
import zoo
from experiments.data.augment import AugmentConfig, PreprocessConfig
from experiments.data.images import ImagesConfig
from experiments.encoders.class_weights import ClassWeights
from experiments.loop.adapting import AdaptConfig, check_start
from experiments.loop.duration import check_duration
from experiments.loop.few_bits import QuantizeConfig, check_bits
from experiments.loop.mesh import MeshConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.seeds import check_different
from experiments.loop.train import TrainConfig
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """An image classifier: its shape, its images, what is done to them, its training."""

    model: zoo.ImageClassifierConfig = zoo.ImageClassifierConfig()
    """Shape of the model. n_classes 0 takes the images'."""
    data: ImagesConfig = ImagesConfig()
    """Images and their classes."""
    image_size: int | None = None
    """Pixels to a side of what the model sees. None: --model.image-size, from which learned positions are
    interpolated."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """From an image to an array."""
    augment: AugmentConfig = AugmentConfig()
    """What training does to images."""
    class_weights: ClassWeights = "none"
    """balanced: in training, rare classes count as much as frequent ones."""
    init: str | None = None
    """A run, a published folder or a hub name to go on from: its shape replaces --model, flags that say otherwise are
    refused, and the preprocessing that its folder states replaces --preprocess. Its classifier stays where it has as
    many classes."""
    drop_path: float | None = None
    """Stochastic depth while --init is tuned. None: as its config says."""
    evaluate_only: bool = False
    """Do not train, but say how good --init is."""
    epochs: float | None = None
    """Passes over the training images, instead of --steps."""
    eval_epochs: int = 1
    """With --epochs, passes between evaluations."""
    warmup_fraction: float | None = None
    """Share of the steps that warm up, instead of --optim.warmup-steps."""
    seeds: tuple[int, ...] = ()
    """A run for each, in folders of their own, and the mean. None given: one run, of --train.seed."""
    threads: int = 4
    """Batches that are read and changed at the same time, each by a thread."""
    mistakes: int = 25
    """Pictures in mistakes.png."""
    train: TrainConfig = TrainConfig(batch_size=64)
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    adapt: AdaptConfig = AdaptConfig()
    """Adapters of --init, which stays as it is, rather than all of it."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Few bits that weights are read in, and the model is trained for; see `zoo.quantize`."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    run_dir: str | None = None
    """Folder of the run. None: runs/vit/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        if self.evaluate_only and self.init is None:
            raise ValueError("--evaluate-only is for an --init; without one there is nothing to evaluate")
        check_start(self.adapt, self.init)
        check_bits(self.quantize, self.adapt)
        check_duration(self)
        for name in ("eval_epochs", "threads", "mistakes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")
        check_different(self.seeds)


def small_classifier(d_model: int, n_layers: int, image_size: int, patch_size: int, **fields: Any):
    """A small classifier for m2/monarch, attn/mlp, vim or "ss2d/mlp[d_ff=d_model]": of about equal size, by one flag.

    There is no class token and positions are learned, so that nothing but the mixer differs.
    """
    options: dict[str, Any] = {
        "pattern": "m2/monarch",
        "n_classes": 0,
        "channels": 1,
        "class_token": "none",
        "pool": "mean",
        "m2": M2Config(l_max=(image_size // patch_size) ** 2, filter=HyenaFilterConfig(order=16)),
        "monarch": MonarchMLPConfig(gated=False, d_ff=6 * d_model),
        "attn": zoo.AttentionConfig(head_dim=16, position="none", bias=True),
        "mlp": zoo.MLPConfig(gated=False, activation="gelu", bias=True, d_ff=2 * d_model),
        "mamba": ssm.MambaConfig(d_state=8),
        "vim": ssm.MambaConfig(d_state=8),
        "ss2d": ssm.SS2DConfig(d_state=1),
    }
    return zoo.ImageClassifierConfig(
        d_model=d_model, n_layers=n_layers, image_size=image_size, patch_size=patch_size, **options | fields
    )


IMAGENET = PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_fraction=0.875)


def _deit(name: str, *, decay: float = 0.05, drop_path: float = 0.1) -> Config:
    # Source: facebookresearch/deit, main.py: batches of 1,024, 5e-4 for each 512 of them, 5 of 300 epochs of warm-up,
    # betas 0.9 and 0.999, cosine to 1e-5, no clipping, EMA 0.99996, each image three times in a batch.
    # Vim's: hustvl/Vim, vim/scripts: the same but for weight decay and stochastic depth.
    model = zoo.presets[name]
    assert isinstance(model, zoo.ImageClassifierConfig)
    return Config(
        model=dataclasses.replace(model, n_classes=0, drop_path=drop_path),
        data=ImagesConfig(hub="ILSVRC/imagenet-1k"),
        preprocess=IMAGENET,
        augment=AugmentConfig(
            crop="resized", flip=0.5, rand_augment=2, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, repeats=3
        ),
        epochs=300,
        warmup_fraction=5 / 300,
        threads=32,
        train=TrainConfig(batch_size=1024, log_every=50, save_every=1000, ema=0.99996),
        optim=OptimConfig(learning_rate=1e-3, final_fraction=0.01, weight_decay=decay, beta2=0.999, clip=0.0),
    )


_DIGITS = AugmentConfig(crop="shift", shift=0.1, rotate=10.0, smoothing=0.1)
PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "Monarch Mixer on scikit-learn's 8 x 8 digits: no downloads, a minute or two on two CPU cores.",
        Config(
            model=small_classifier(48, 3, 8, 1),
            augment=_DIGITS,
            epochs=30,
            eval_epochs=10,
            warmup_fraction=0.1,
            train=TrainConfig(batch_size=64, log_every=50),
            optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, final_fraction=0.01),
        ),
    ),
    "mnist": (
        "Monarch Mixer of 0.13 M parameters on the 4,000 images of MNIST-5k, its 1,000 others for evaluation; fetched.",
        Config(
            model=small_classifier(64, 3, 28, 4, stem="conv"),
            data=ImagesConfig(fetched="mnist-5k", validation_split="test", test_splits=()),
            augment=_DIGITS,
            epochs=15,
            eval_epochs=5,
            warmup_fraction=0.1,
            train=TrainConfig(batch_size=32, log_every=50, save_every=500),
            optim=OptimConfig(learning_rate=2e-3, weight_decay=0.05, final_fraction=0.01),
        ),
    ),
    "sequential-mnist": (
        "The same images as 784 pixels in a row, one a token, each seeing those before it alone.",
        Config(
            model=small_classifier(
                64, 2, 28, 1, pattern="mamba", position="none", causal=True, attn=zoo.AttentionConfig(head_dim=16)
            ),
            data=ImagesConfig(fetched="mnist-5k", validation_split="test", test_splits=()),
            epochs=8,
            eval_epochs=2,
            warmup_fraction=0.1,
            train=TrainConfig(batch_size=32, log_every=50, save_every=500),
            optim=OptimConfig(learning_rate=3e-3, weight_decay=0.05, final_fraction=0.01),
        ),
    ),
    "cifar10": (
        "A Vim of 64 patches on CIFAR-10, from the hub; an hour on an accelerator.",
        Config(
            model=small_classifier(192, 12, 32, 4, channels=3, pattern="vim", drop_path=0.1),
            data=ImagesConfig(hub="uoft-cs/cifar10", validation_split="test", test_splits=()),
            preprocess=PreprocessConfig(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
            augment=AugmentConfig(
                crop="shift", shift=0.125, flip=0.5, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1
            ),
            epochs=200,
            eval_epochs=5,
            warmup_fraction=0.05,
            train=TrainConfig(batch_size=256, log_every=50, save_every=1000, ema=0.999),
            optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, final_fraction=0.01, beta2=0.999),
        ),
    ),
}
_PUBLISHED = {
    **{f"deit-{size}": _deit(f"vit-{size}") for size in ("tiny", "small", "base")},
    "m2-vit-base": _deit("m2-vit-base"),
    "vim-tiny": _deit("vim-tiny", decay=0.1, drop_path=0.0),
    "vim-small": _deit("vim-small", drop_path=0.05),
    "vim-base": _deit("vim-base"),
}
PRESETS |= {
    name: (f"The shape of {name} and DeiT's recipe, on ImageNet from the hub; for accelerators.", config)
    for name, config in _PUBLISHED.items()
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("threads", "mistakes", "data.skip_bad")
