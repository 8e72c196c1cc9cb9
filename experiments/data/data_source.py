"""What labelled texts and images share: where `--data.*` says that they are, and what their splits are called.

What is on this machine is read without asking anybody. The network is used where a command names something on it, and
only then: a data set, a model or a tokenizer by its name on the Hugging Face hub (--data.hub, --data.loco-*, --init,
--data.tokenizer, a model to sample or convert), `experiments.data fetch`, which asks a package index, and
--train.wandb. With HF_HUB_OFFLINE=1 the hub is not asked, and what was downloaded earlier is used.
"""

from pathlib import Path
from typing import Any, Protocol

from experiments.data import fetch
from experiments.data.deep_json import refuse_deep_json
from experiments.data.tokenizers import first_line

# File name -> split.
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test"}


class Source(Protocol):
    """The fields that say where data are. All None: data that come with a package."""

    @property
    def path(self) -> str | None: ...
    @property
    def hub(self) -> str | None: ...
    @property
    def fetched(self) -> str | None: ...
    @property
    def validation_fraction(self) -> float: ...


def check(config: Source, few: str) -> None:
    """Checks the fields, and the one called `few`: how many to train on, None for all.

    Raises:
      ValueError: names the flag, its value and what was expected.
    """
    given = [name for name in ("path", "hub", "fetched") if getattr(config, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--data.{given[0]} and --data.{given[1]} exclude each other; give one")
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"--data.validation-fraction {config.validation_fraction}, expected between 0 and 1")
    if (number := getattr(config, few)) is not None and number < 1:
        raise ValueError(f"--data.{few.replace('_', '-')} {number}, expected at least 1")


def local(config: Source) -> tuple[Path, str] | None:
    """The path of what is on this machine, and the flag that says so, for messages. None: neither path nor fetched."""
    if config.fetched is not None:
        return fetch.path(config.fetched), f"--data.fetched {config.fetched}"
    if config.path is not None:
        return Path(config.path).expanduser(), f"--data.path {config.path}"
    return None


def datasets_library() -> Any:
    """The library `datasets`, which takes seconds to import, and which reports to nobody what it is used for."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request for each data set, local files' too
    return datasets


def load_hub(spec: str) -> Any:
    """The splits of a data set of the Hugging Face hub, NAME or NAME:CONFIG, as the library `datasets` has them.

    Raises:
      ValueError: no network, no such data set, or no access to it.
    """
    datasets = datasets_library()
    datasets.disable_progress_bars()
    name, _, subset = spec.partition(":")
    try:
        if Path(name).is_dir():
            refuse_deep_json(Path(name))
        return datasets.load_dataset(name, subset or None)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"--data.hub {spec} cannot be loaded ({first_line(error)}); expected NAME or NAME:CONFIG of a data set on "
            "the Hugging Face hub. HF_HUB_OFFLINE=1 uses a copy downloaded earlier, --data.path reads local files"
        ) from error
