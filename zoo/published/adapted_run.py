"""The model of a run that trains adapters: checkpoints hold what is trained, and the folder what that is an adapter of.

    run/adapter.json     which adapters: {"rank": 8, "alpha": null, "targets": null, "dora": false, "trained": "", ...}
    run/base/            the model that they adapt, in our own layout, once

`zoo.from_pretrained` of such a run gives the adapted model with its weights merged, an ordinary one; `zoo.load_adapter`
puts the adapters on the model of the folder `base`, as they are trained.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from zoo.published.checkpoint_files import read_params
from zoo.published.run_folder import find_checkpoint, read_options
from zoo.reuse.adapt import add_lora
from zoo.reuse.linear_maps import Model

ADAPTER_FILE = "adapter.json"
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Which adapters a run trains; see `zoo.add_lora`."""

    rank: int
    """r."""
    alpha: float | None = None
    """Factor on the change, times r. None: r."""
    targets: str | None = None
    """Which maps. None: all of the blocks."""
    dora: bool = False
    """Whether magnitudes are trained, too."""
    trained: str = ""
    """Parameters that are trained as they are. Empty: none."""
    begun_in: str = ""
    """The run's folder as it began; a run that was rescued from there has its base there."""

    def on(self, model: Model, *, rngs: nnx.Rngs) -> Model:
        """A model with these adapters, fresh ones."""
        return add_lora(
            model,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            dora=self.dora,
            trained=self.trained or None,
            rngs=rngs,
        )


def is_adapted(folder: Path) -> bool:
    """Whether a folder is that of a run that trains adapters."""
    return (folder / ADAPTER_FILE).is_file()


def read_adapters(folder: Path) -> Adapters:
    """Which adapters a run trains.

    Raises:
      ValueError: what says so is damaged.
    """
    return read_options(Adapters, folder / ADAPTER_FILE, "describes no adapters")


def base_of(folder: Path) -> Path:
    """The folder of the model that a run's adapters are for.

    Raises:
      FileNotFoundError: it is gone.
    """
    for place in (folder, Path(read_adapters(folder).begun_in)):
        if (place / BASE / "config.json").is_file():
            return place / BASE
    raise FileNotFoundError(f"{folder / BASE} is gone, the model that the adapters of {folder} are for")


def load_trained(folder: Path, base: Model, revision: str | int | None = None) -> Model:
    """A run's model as it is trained: frozen, with the adapters of a checkpoint.

    Args:
      folder: the run's.
      base: the model of `base_of(folder)`. It stays as it is.
      revision: a step, "latest" or "best". None: latest.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: a checkpoint of other adapters: names a parameter.
    """
    checkpoint = find_checkpoint(folder, revision)
    model = read_adapters(folder).on(base, rngs=nnx.Rngs(0))
    params, values = nnx.to_flat_state(nnx.state(model, nnx.Param)), read_params(checkpoint)
    there = {".".join(map(str, path)): param for path, param in params}
    if other := sorted(there.keys() ^ values.keys()):
        what = "is not trained by these adapters" if other[0] in values else "is missing"
        raise ValueError(f"{checkpoint}: {other[0]} {what}")
    for name, param in there.items():
        if values[name].shape != param.shape:
            raise ValueError(f"{checkpoint}: {name} is {values[name].shape}, expected {param.shape}")
    filled = [
        (path, param.replace(jnp.asarray(values[".".join(map(str, path))], param.dtype))) for path, param in params
    ]
    nnx.update(model, nnx.from_flat_state(filled))
    return model
