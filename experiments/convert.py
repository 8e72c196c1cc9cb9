"""A model from one published layout to another, or from a run to a published layout.

    python -m experiments.convert state-spaces/mamba-130m out --layout transformers
    python -m experiments.convert runs/causal_lm/tiny out --layout official        # what state-spaces/mamba loads
    python -m experiments.convert out back --layout official --dtype bfloat16

What is written is read back and compared before the command says so.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.causal_lm import load_run
from experiments.data.tokenizers import save_tokenizer
from experiments.encoders.objectives import FILE_NAME as LABELS_FILE
from experiments.encoders.objectives import load_target
from experiments.encoders.publish import config_fields, in_own_unit, publish_target
from experiments.loop import flags, runs
from experiments.vision.meaning import IMAGES_FILE, load_meaning, write_preprocess
from zoo.models.build import Model
from zoo.published.pretrained import find_folder, read_config_file
from zoo.published.transformers_fields import class_fields, named_classes

# What a published model has beside its weights.
_COMPANIONS = (
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
)
_DTYPE_OF_RUN = "--dtype {} with a run: a run is written in the dtype it was trained in"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts weights, config and tokenizer."""

    source: Annotated[str, flags.Positional]
    """A folder in a published layout, a name on the Hugging Face hub, or the folder of a run."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    layout: Literal["official", "transformers"] = "transformers"
    """official: what state-spaces/mamba, HazyResearch/m2 or hustvl/Vim loads. transformers: what transformers loads;
    Mamba-3, Vision Mamba and M2-BERT are not among it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to store weights in. None: that of the source."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    max_shard_gb: float = 5.0
    """Largest file, in 10^9 bytes; more become numbered shards."""


def main() -> int:
    """Loads, writes, reads back and compares."""
    config = flags.parse_one(Config, prog="python -m experiments.convert", description=__doc__)
    with flags.usage_errors():
        if config.target.exists() and any(config.target.iterdir()):
            raise ValueError(f"{config.target} is not empty; choose another folder")
        model, folder, extra = _load(config)
        limit = int(config.max_shard_gb * 1e9)
        zoo.save_pretrained(model, config.target, config.layout, extra=extra, max_shard_bytes=limit)
        _copy_companions(config, folder)
        written = _params(zoo.from_pretrained(config.target))
        for path, expected in _params(model).items():
            if not np.array_equal(np.asarray(written[path]), np.asarray(expected)):
                raise ValueError(f"{config.target}: {path} does not read back as it was written")
    size = sum(param.size for param in written.values())
    print(f"{config.source} -> {config.target}: {size:,} parameters in the {config.layout} layout, read back and equal")
    return 0


def is_run(source: str | Path) -> bool:
    """Whether a folder is that of a run, rather than one in a published layout."""
    return (Path(source) / "checkpoints").is_dir()


def _load(config: Config) -> tuple[Model, Path | None, dict[str, Any]]:
    """The model, the folder of what lies beside it if that can be copied, and more fields of its config."""
    if (Path(config.source) / runs.MODEL_FILE).is_file():  # an encoder's or an image classifier's
        folder = Path(config.source)
        model = runs.restore_model(folder, runs.load_model_config(folder), step=config.checkpoint)
        if config.dtype:
            raise ValueError(_DTYPE_OF_RUN.format(config.dtype))
        if (folder / IMAGES_FILE).is_file():
            return model, folder, dict(named_classes(load_meaning(folder).classes))
        if (folder / LABELS_FILE).is_file():
            target = load_target(folder)
            return in_own_unit(model, target), folder, config_fields(target, getattr(model.config, "n_labels", 0))
        return model, folder, {}
    if is_run(config.source):
        model, tokenizer, _ = load_run(config.source, step=config.checkpoint)
        if config.dtype:
            raise ValueError(_DTYPE_OF_RUN.format(config.dtype))
        return model, None, {"eos_token_id": tokenizer.eot} if config.layout == "transformers" else {}
    folder = find_folder(config.source)
    published = zoo.from_pretrained(folder, dtype=config.dtype)
    raw, _ = read_config_file(folder)
    keep = _TOKEN_IDS if config.layout == "transformers" else ()
    return (
        published,
        folder,
        {name: raw[name] for name in keep if name in raw}
        | class_fields(raw, getattr(published.config, "n_classes", getattr(published.config, "n_labels", 0))),
    )


def _copy_companions(config: Config, folder: Path | None) -> None:
    if folder is None:
        save_tokenizer(load_run(config.source, step=config.checkpoint)[1], config.target)
        return
    for pattern in _COMPANIONS:
        for path in folder.glob(pattern):
            shutil.copyfile(path, config.target / path.name)
    publish_target(folder, config.target)
    if (folder / IMAGES_FILE).is_file():
        write_preprocess(load_meaning(folder), config.target)


def _params(model) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): param[...] for path, param in flat}


if __name__ == "__main__":
    flags.run(main)
