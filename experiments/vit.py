"""Image classification: any pattern of mixers over patches, any images.

    python -m experiments.vit tiny                                       # 8 x 8 digits, no download, a minute or two
    python -m experiments.vit mnist                                      # MNIST-5k: Monarch Mixer over 49 patches
    python -m experiments.vit mnist --model.pattern attn/mlp             # ViT; also vim, "ss2d/mlp[d_ff=64]"
    python -m experiments.vit mnist --seeds 0 1 2                        # the mean of three runs
    python -m experiments.vit sequential-mnist --model.pattern mamba     # 784 pixels, one a token
    python -m experiments.vit tiny --data.path photos/ --model.image-size 32 --model.channels 3
    python -m experiments.vit deit-small                                 # ImageNet from the hub, for accelerators
    python -m experiments.vit deit-small --init FOLDER --evaluate-only   # how good published weights are on it

`python -m experiments.data fetch mnist-5k` brings the digits of MNIST. The same command again resumes the run where it
was. In a notebook: `vit.predict(RUN_DIR, [image, ...])`.
"""

import dataclasses
import functools
import json
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

import ssm
import zoo
from experiments.data.augment import AugmentConfig, Preprocess, PreprocessConfig, mix
from experiments.data.images import Images, ImagesConfig, LabelledImages, load_images
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.encoders.confusion import plot_confusion
from experiments.encoders.mistakes import plot_mistakes
from experiments.encoders.scores import Scores
from experiments.loop import flags, runs, seeds
from experiments.loop.metrics import read_metrics
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.train import Loss, Task, TrainConfig, make_mesh, spread, train, with_auxiliary
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from zoo.layers.image_tokens import grid_of
from zoo.published.pretrained import find_folder


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
    init: str | None = None
    """A run, a published folder or a hub name to go on from: its shape replaces --model, and the preprocessing that its
    folder states replaces --preprocess. Its classifier stays where it has as many classes."""
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
    run_dir: str | None = None
    """Folder of the run. None: runs/vit/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        if self.evaluate_only and self.init is None:
            raise ValueError("--evaluate-only is for an --init; without one there is nothing to evaluate")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"--epochs {self.epochs}, expected more than 0")
        if self.epochs is not None and self.train.steps != TrainConfig().steps:
            raise ValueError(f"--steps {self.train.steps} with --epochs {self.epochs}; --epochs None goes by the steps")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"--warmup-fraction {self.warmup_fraction}, expected 0 <= warmup-fraction < 1")
        for name in ("eval_epochs", "threads", "mistakes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}, expected different ones")


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


_IMAGENET = PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_fraction=0.875)


def _deit(name: str, *, decay: float = 0.05, drop_path: float = 0.1) -> Config:
    # Source: facebookresearch/deit, main.py: batches of 1,024, 5e-4 for each 512 of them, 5 of 300 epochs of warm-up,
    # betas 0.9 and 0.999, cosine to 1e-5, no clipping, EMA 0.99996. Its repeated augmentation is not done here.
    # Vim's: hustvl/Vim, vim/scripts: the same but for weight decay and stochastic depth.
    model = zoo.presets[name]
    assert isinstance(model, zoo.ImageClassifierConfig)
    return Config(
        model=dataclasses.replace(model, n_classes=0, drop_path=drop_path),
        data=ImagesConfig(hub="ILSVRC/imagenet-1k"),
        preprocess=_IMAGENET,
        augment=AugmentConfig(
            crop="resized", flip=0.5, rand_augment=2, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1
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
FREE = ("threads", "mistakes")
# The file of a run that says what its model's inputs and outputs are.
IMAGES_FILE = "images.json"


class Prepared(NamedTuple):
    """What the runs of all seeds share."""

    data: LabelledImages
    model: zoo.ImageClassifierConfig
    preprocess: Preprocess
    train: TrainConfig
    optim: OptimConfig
    """With numbers of steps for epochs and shares."""


class Trained(NamedTuple):
    """A run that has ended."""

    model: Any
    scores: dict[str, Scores]
    """Of the last step, by split: loss, accuracy, and top5 where there are more than five classes."""
    stopped: bool
    """Whether a signal ended it before its last step; there are no scores then."""


def image_loss(model: Any, batch: Mapping[str, Any], rngs: nnx.Rngs | None, *, smoothing: float) -> Loss:
    """Cross-entropy of the classes of both images that each image is made of, by their shares."""
    hidden, auxiliary = model.run(batch["images"], rngs=rngs)
    logits = model.read(hidden)

    def nats(labels):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    share = batch["share"]
    each = share * nats(batch["labels"]) + (1 - share) * nats(batch["partners"])
    return with_auxiliary(Loss(jnp.sum(each), jnp.float32(len(each))), model, auxiliary)


def load_model(source: str | Path, *, step: Any = "latest") -> tuple[Any, Path]:
    """An image classifier and its folder: of a run, in a published layout, or by a name on the hub.

    Args:
      step: which checkpoint of a run: a step, "latest" or "best".

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no image classifier.
    """
    folder = Path(source)
    if (folder / runs.MODEL_FILE).is_file():
        model = runs.restore_model(folder, runs.load_model_config(folder), step=step)
    else:
        folder = find_folder(source)
        model = zoo.from_pretrained(folder)
    if not isinstance(model, zoo.ImageClassifier):
        raise ValueError(f"{source} holds a {type(model).__name__}, expected an image classifier")
    return model, folder


class Meaning(NamedTuple):
    """What goes into the model of a run and what comes out."""

    preprocess: PreprocessConfig
    image_size: int
    classes: tuple[str, ...]


def save_meaning(prepared: Prepared, folder: Path) -> None:
    """Writes images.json."""
    preprocess = prepared.preprocess
    said = Meaning(preprocess.config, preprocess.size, prepared.data.classes)._asdict()
    said["preprocess"] = dataclasses.asdict(preprocess.config)
    (folder / IMAGES_FILE).write_text(json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8")


def load_meaning(folder: Path) -> Meaning:
    """Reads what `save_meaning` wrote.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    path = folder / IMAGES_FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        preprocess = flags.from_dict(PreprocessConfig, said["preprocess"])
        return Meaning(preprocess, int(said["image_size"]), tuple(said["classes"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_preprocess(said: Meaning, folder: Path) -> None:
    """Writes preprocessor_config.json, as transformers reads it."""
    square = {"height": said.image_size, "width": said.image_size}
    whole = round(said.image_size / said.preprocess.crop_fraction)
    raw = {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": whole, "width": whole},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(said.preprocess.mean),
        "image_std": list(said.preprocess.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def read_preprocess(folder: Path, default: PreprocessConfig) -> PreprocessConfig:
    """The preprocessing that a model's folder states: that of a run, or transformers' preprocessor_config.json."""
    if (folder / IMAGES_FILE).is_file():
        return load_meaning(folder).preprocess
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return default
    try:
        raw = json.loads(path.read_text())
        sizes = [raw.get(name) for name in ("crop_size", "size")]
        crop, size = (min(s.values()) if isinstance(s, dict) else s for s in sizes)
        fraction = crop / size if raw.get("do_center_crop") and crop and size else 1.0
        mean, std = (tuple(map(float, raw[name])) for name in ("image_mean", "image_std"))
        return PreprocessConfig(mean=mean, std=std, crop_fraction=min(1.0, fraction))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def prepare(config: Config) -> Prepared:
    """Finds the images, and the shape of the model that classifies them."""
    data = load_images(config.data)
    model, preprocess = config.model, config.preprocess
    if config.init is not None:
        loaded, folder = load_model(config.init)
        model, preprocess = loaded.config, read_preprocess(folder, preprocess)
        if config.drop_path is not None:
            model = dataclasses.replace(model, drop_path=config.drop_path)
    n_classes = len(data.classes)
    if config.init is None and model.n_classes not in (0, n_classes):
        raise ValueError(
            f"--model.n-classes {model.n_classes}, but {data.where} has {n_classes} classes; set it to 0 to take theirs"
        )
    if config.evaluate_only and model.n_classes != n_classes:
        raise ValueError(f"--init {config.init} has {model.n_classes} classes, {data.where} has {n_classes}")
    model = dataclasses.replace(model, n_classes=n_classes)
    size = config.image_size or model.image_size
    rows, columns = grid_of(size, size, model.patch_size, model.stride)
    if model.max_tokens is not None and rows * columns + model.n_tokens > model.max_tokens:
        raise ValueError(
            f"images of {size} x {size} pixels are {rows * columns + model.n_tokens} tokens, --model.m2.l-max "
            f"{model.max_tokens}: filters are at most l-max long"
        )
    train_config, optim = config.train, config.optim
    n_batches = -(-len(next(iter(data.splits.values())).labels) // train_config.batch_size)
    if config.epochs is not None:
        steps, between = max(1, round(config.epochs * n_batches)), config.eval_epochs * n_batches
        train_config = dataclasses.replace(train_config, steps=steps, eval_every=between)
    if config.warmup_fraction is not None:
        optim = dataclasses.replace(optim, warmup_steps=round(config.warmup_fraction * train_config.steps))
    return Prepared(data, model, Preprocess(preprocess, size, model.channels, config.augment), train_config, optim)


def training_batch(images: Images, rows: np.ndarray, preprocess: Preprocess, seed: int, step: int) -> Batch:
    """The batch of a step: its images, changed at random and mixed. Row -1 is filled with one of the others."""
    random = np.random.default_rng((seed % (1 << 64), 1, step))
    rows = np.where(rows < 0, random.choice(rows[rows >= 0], len(rows)), rows)
    keys = [np.random.default_rng((seed % (1 << 64), 2, step, place)) for place in range(len(rows))]
    arrays = np.stack([preprocess(images.read(int(row)), key) for row, key in zip(rows, keys, strict=True)])
    labels = images.labels[rows]
    return {"labels": labels} | mix(arrays, labels, preprocess.augment, random)._asdict()


def make_task(config: Config, prepared: Prepared) -> Task:
    """The task of one seed."""
    train_images, held_out = list(prepared.data.splits.values())[:2]
    seed, batch_size = config.train.seed, config.train.batch_size
    plan = Epochs(np.zeros(len(train_images.labels), int), [batch_size], seed=seed)

    def init(rngs: nnx.Rngs) -> nnx.Module:
        if config.init is None:
            return zoo.ImageClassifier(prepared.model, rngs=rngs)
        return zoo.with_head(load_model(config.init)[0], prepared.model, rngs=rngs)

    def make(step: int) -> Batch:
        return training_batch(train_images, plan(step), prepared.preprocess, seed, step)

    return Task(
        init=init,
        loss=functools.partial(image_loss, smoothing=config.augment.smoothing),
        batches=iter(make_batches(make, threads=config.threads, prefetch=2 * config.threads)),
        evaluate=lambda model: score(logits_of(model, held_out, prepared.preprocess, config), held_out.labels),
        tokens_per_batch=batch_size,
        unit="images",
    )


def logits_of(model: Any, images: Images, preprocess: Preprocess, config: Config) -> np.ndarray:
    """(n, k) float32: what a model says of all images, in their order."""
    size, n = config.train.batch_size, len(images.labels)

    def make(number: int) -> Batch:
        rows = range(number * size, min(n, (number + 1) * size))
        arrays = np.stack([preprocess(images.read(row)) for row in rows])
        return {"images": np.pad(arrays, ((0, size - len(rows)), (0, 0), (0, 0), (0, 0)))}

    batches = make_batches(make, n_batches=-(-n // size), threads=config.threads, prefetch=2 * config.threads)
    return apply_over(model, batches)[:n]


def apply_over(model: Any, batches: Iterable[Batch]) -> np.ndarray:
    """The logits of every row of some batches of equal size."""
    graphdef, variables = nnx.split(model)
    mesh = make_mesh()
    logits = [_logits(graphdef, variables, spread(batch, mesh)["images"]) for batch in batches]
    return np.concatenate(jax.device_get(logits)).astype(np.float32)


_logits = jax.jit(
    lambda graphdef, variables, images: nnx.merge(graphdef, variables)(images),
    static_argnums=0,
)


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """loss in nats, accuracy, and top5: how often the class is among the five likeliest of more than five."""
    rows = np.arange(len(labels))
    above = (logits > logits[rows, labels][:, None]).sum(axis=1)
    scores = {"loss": float(np.mean(nats(logits, labels))), "accuracy": float(np.mean(above == 0))}
    return scores | ({"top5": float(np.mean(above < 5))} if logits.shape[1] > 5 else {})


def nats(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) cross-entropies."""
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels)))


def default_run_dir(config: Config) -> Path:
    """runs/vit/PRESET for a preset as it is, with a digest of the changes for a changed one, and "-seeds"."""
    return seeds.default_run_dir(config, PRESETS, "vit", FREE)


def fit(config: Config, folder: Path, prepared: Prepared | None = None) -> Trained:
    """Trains with one seed in a folder, from the run's newest checkpoint where there is one; see `train`.

    Args:
      prepared: what `prepare` gives for this configuration, whatever the seed. None: made here.

    Raises:
      UsageError: images, model or folder are not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    config = seeds.of_one(config)
    with flags.usage_errors():
        runs.holds_run(config, folder, FREE)
        prepared = prepared or prepare(config)
        task = make_task(config, prepared)
        folder.mkdir(parents=True, exist_ok=True)
        runs.save_model_config(prepared.model, folder)
        save_meaning(prepared, folder)
        flags.save_config(config, folder / "config.json")
    print(describe(prepared, folder), flush=True)
    train_config = dataclasses.replace(prepared.train, seed=config.train.seed)
    record = dataclasses.asdict(config) | {"model": dataclasses.asdict(prepared.model)}
    finished = train(task, train_config, prepared.optim, folder, record=record)
    if finished.stopped:
        return Trained(finished.model, {}, stopped=True)
    return Trained(finished.model, write_results(finished.model, folder, config, prepared), stopped=False)


def describe(prepared: Prepared, folder: Path) -> str:
    """What is about to happen, in two lines."""
    sizes = ", ".join(f"{len(images.labels):,} {name}" for name, images in prepared.data.splits.items())
    size = prepared.preprocess.size
    return (
        f"{prepared.model.pattern}: {count_params(prepared.model):,} parameters; {folder}\n"
        f"{len(prepared.data.classes)} classes: {sizes} images of {size} x {size}"
    )


def write_results(model: Any, folder: Path, config: Config, prepared: Prepared) -> dict[str, Scores]:
    """Scores of every split but that of training; predictions.jsonl, confusion.png and mistakes.png in the folder.

    The pictures are of the images that were kept for testing, or else of those held out.
    """
    classes, folder = prepared.data.classes, Path(folder)
    splits = list(prepared.data.splits.items())[1:]
    logits = {name: logits_of(model, images, prepared.preprocess, config) for name, images in splits}
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for name, images in splits:
            probabilities = np.asarray(jax.nn.softmax(logits[name], axis=-1))
            for row, (label, p) in enumerate(zip(images.labels, probabilities, strict=True)):
                best = int(np.argmax(p))
                record = {"split": name, "row": row, "label": classes[label], "predicted": classes[best]}
                file.write(json.dumps(record | {"probability": float(p[best])}, ensure_ascii=False) + "\n")
    name, images = splits[-1]
    predicted = np.argmax(logits[name], axis=1)
    if len(classes) <= 60:
        said, true = ([classes[i] for i in rows] for rows in (predicted, images.labels))
        plot_confusion(said, true, classes, folder, name)
    plot_mistakes(images, logits[name], classes, folder, name, n=config.mistakes)
    return {name: score(logits[name], images.labels) for name, images in splits}


def fit_seeds(config: Config, folder: Path) -> list[Trained]:
    """A run for each seed: in the folder itself where there is one, else in its seed-0, seed-1, ...

    Ends at the first run that is stopped. The table of them, their speed and their memory are in results.json.

    Raises:
      UsageError, FloatingPointError: as `fit`.
    """
    numbers = config.seeds or (config.train.seed,)
    if len(numbers) > 1:
        folders = [folder / f"seed-{number}" for number in numbers]
        trained = seeds.fit_several(config, folder, prepare=lambda config, _: prepare(config), fit=fit, free=FREE)
    else:
        folders, trained = [folder], [fit(seeds.with_seed(config, numbers[0]), folder)]
    if not trained[-1].stopped:
        speeds = [r["images_per_second"] for f in folders for r in read_metrics(f) if "images_per_second" in r]
        beside = {"images_per_second": float(np.median(speeds)), "peak_memory_bytes": peak_memory()}
        seeds.save_summary(folder, numbers, [run.scores for run in trained], **beside)
    return trained


def peak_memory() -> int:
    """The most bytes in use so far: of the first device where it says so, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats.get("peak_bytes_in_use", used)


def evaluate_only(config: Config) -> dict[str, Scores]:
    """Scores of --init as it is, on every split but that of training."""
    with flags.usage_errors():
        prepared = prepare(config)
        model, _ = load_model(config.init or "")
    splits = list(prepared.data.splits.items())[1:]
    return {name: score(logits_of(model, each, prepared.preprocess, config), each.labels) for name, each in splits}


def main() -> int:
    """Trains, evaluates and shows a table."""
    config = flags.parse(PRESETS, prog="python -m experiments.vit", description=__doc__)
    if config.evaluate_only:
        print("\n".join(seeds.table(seeds.summarise([evaluate_only(config)]))))
        return 0
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    trained = fit_seeds(config, folder)
    if trained[-1].stopped:
        return 0
    rows: dict[str, Mapping[str, seeds.Summary]] = dict(seeds.summarise([run.scores for run in trained]))
    several = f", mean of {len(trained)} seeds ± their standard deviation" if len(trained) > 1 else ""
    print(f"after the last step{several}:")
    print("\n".join(f"  {line}" for line in seeds.table(rows)))
    print(
        f"run folder: {folder} (results.json, predictions.jsonl, confusion.png, mistakes.png, curves.png, checkpoints)"
    )
    return 0


class Prediction(NamedTuple):
    """What a model says of an image."""

    label: str
    """The likeliest class."""
    probabilities: dict[str, float]
    """Of every class."""


def predict(
    folder: str | Path, images: Sequence[Image.Image | np.ndarray | str | Path], *, step: Any = "latest"
) -> list[Prediction]:
    """What the model of a run says of some images.

    Args:
      folder: of a run of one seed.
      images: Pillow's, arrays (x, y) or (x, y, 3) of 0 to 255, or files.
      step: which checkpoint: a step, "latest" or "best".

    Raises:
      FileNotFoundError: no run in the folder, or no such file.
      ValueError: the folder holds another model, or a file is no image.
    """
    folder = Path(folder)
    model, _ = load_model(folder, step=step)
    said = load_meaning(folder)
    classes, preprocess = said.classes, Preprocess(said.preprocess, said.image_size, model.config.channels)

    def opened(image) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        return Image.open(image) if isinstance(image, str | Path) else Image.fromarray(np.asarray(image, np.uint8))

    if not len(images):
        return []
    logits = _logits(*nnx.split(model), np.stack([preprocess(opened(image)) for image in images]))
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1), float)
    return [Prediction(classes[int(np.argmax(p))], dict(zip(classes, p.tolist(), strict=True))) for p in probabilities]


if __name__ == "__main__":
    flags.run(main)
