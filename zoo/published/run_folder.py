"""The model that a training run left in its folder: model.json says which, its checkpoints hold the parameters."""

from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from zoo.models.build import MODELS, ModelConfig
from zoo.models.causal import CausalLMConfig
from zoo.published.checkpoint_files import choose_checkpoint, read_record
from zoo.published.json_files import read_json
from zoo.stack.option_values import from_dict, with_values

Options = TypeVar("Options")
# The file of a run that says which model its checkpoints are of.
MODEL_FILE = "model.json"
_CONFIG_FILE = "config.json"  # of the experiment: before all runs had model.json, causal models were found in it


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, rather than one in a layout."""
    return (folder / "checkpoints").is_dir() or (folder / MODEL_FILE).is_file()


def runs_inside(folder: Path) -> list[str]:
    """The folders of runs right in a folder that is none itself: of several seeds, of stages."""
    return [] if is_run(folder) or not folder.is_dir() else sorted(f.name for f in folder.iterdir() if is_run(f))


def find_checkpoint(folder: Path, revision: str | int | None = None) -> Path:
    """The folder of a run's checkpoint.

    Args:
      folder: the run's.
      revision: a step's number, "latest" or "best". None: latest.

    Raises:
      FileNotFoundError: no such checkpoint, or it is damaged.
      ValueError: revision is none of these.
    """
    step = "latest" if revision is None else str(revision)
    if step not in ("latest", "best") and not step.isdecimal():
        raise ValueError(f"revision={revision!r} of the run {folder}, expected 'latest', 'best' or a step")
    return choose_checkpoint(folder, cast(Literal["latest", "best"], step) if not step.isdecimal() else int(step))


def read_model_config(folder: Path, checkpoint: Path | None = None) -> ModelConfig:
    """Which model the checkpoints of a run are of.

    Args:
      folder: the run's.
      checkpoint: one of them, whose table of token vectors says how many there are where a run does not.

    Raises:
      FileNotFoundError: nothing says so.
      ValueError: what says so is damaged.
    """
    path = folder / MODEL_FILE
    if not path.is_file() and checkpoint is not None and (folder / _CONFIG_FILE).is_file():
        return _older(folder / _CONFIG_FILE, checkpoint)
    kinds = {kind.__name__: kind for kind in MODELS}
    try:
        said = read_json(path)
        return from_dict(kinds[said["kind"]], said["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} describes no model: {error}") from error


def read_options(kind: type[Options], path: Path, complaint: str) -> Options:
    """The options that a file of a run's folder says, as a dataclass.

    Args:
      kind: the dataclass.
      path: the file.
      complaint: what is wrong where it is damaged, behind its name.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return from_dict(kind, read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} {complaint}: {error}") from error


def _older(path: Path, checkpoint: Path) -> ModelConfig:
    """The causal model of an experiment whose configuration alone describes it."""
    try:
        config = from_dict(CausalLMConfig, read_json(path)["model"])
        if config.vocab_size:
            return config
        tokenizer = path.parent / "tokenizer.json"
        size = _count_tokens(read_json(tokenizer)) if tokenizer.is_file() else 0
        arrays: dict[str, Any] = read_record(checkpoint)["arrays"]
        rows = next(shape[0] for name, (_, shape) in arrays.items() if name == "params.embedding.embedding")
        return with_values(config, {"vocab_size": size or rows})
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise ValueError(f"{path} describes no causal language model: {error}") from error


def _count_tokens(said: dict[str, Any]) -> int:
    """How many ids the tokenizer of a run gives out: of bytes, the last ends documents."""
    if said.get("kind") == "bytes":
        return 257
    vocabulary, added = said["model"]["vocab"], said.get("added_tokens", [])
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(token["id"] for token in added)])
