"""Checkpoints of a run that survive a kill, a full disk and damaged files.

    run/checkpoints/120/state/          the arrays, an orbax checkpoint: {"params.embed.embedding": array, ...}
    run/checkpoints/120/record.json     dtype and shape of each array, data_state, metrics
    run/checkpoints/120/manifest.json   size and SHA-256 of every other file
    run/checkpoints/110.damaged/        set aside: a file of it was not what had been written
    run/checkpoints/120.diverged/       set aside: the run's loss had gone astray before, see `divergence`
    run/checkpoints/130.partial/        half written or half deleted: cleared away when the run goes on

A checkpoint is written into `130.partial`, manifest last, and becomes `130` by one rename. So a folder whose name is a
number is whole, and whatever disagrees with its manifest later is damage. orbax's CheckpointManager commits a step
before a manifest could be part of it, and deletes old steps while it saves; so both are done here, in that order, and
orbax does what it is good at: the arrays.

`begin` copies the state to the host and writes behind the training's back; one save is on its way at a time. Of several
processes each writes its pieces of the arrays and takes their digests. Process 0 waits for all, looks whether every
array is there, and renames: what failed anywhere is nowhere a checkpoint. It is restored onto any devices of any number
of processes, each of which checks its share of the files, and reads what its own need.

Names are `jax.tree_util` paths joined by dots: what holds the arrays (dataclass, nnx.State, optax tuple, dict) is not
part of the format. One process at a time may save into a folder; others may read it with `restore_params`. How a
checkpoint is read and checked is in `zoo.published.checkpoint_files`, where `zoo.from_pretrained` is, too.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import distributed
from experiments.loop.host_arrays import HostArray, is_key, to_devices, to_host, wanted_of
from experiments.loop.piece_files import Finish, read_pieces, write_pieces
from experiments.loop.saving import Save, Written, together
from zoo.published.checkpoint_files import (
    Damaged,
    check_checkpoint,
    checkpoint_steps,
    checkpoints_root,
    choose_checkpoint,
    params_part,
    rank_checkpoints,
    read_arrays,
    read_record,
)

Tree = TypeVar("Tree")

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What `Checkpoints.restore_latest` found."""

    step: int
    state: Any
    data_state: dict
    metrics: dict[str, float]


class Checkpoints:
    """The checkpoints of one run, in folder/"checkpoints": the newest n and the best are kept, damaged ones set aside.

    Args:
      folder: the run's folder; made if missing.
      keep_last: how many of the newest checkpoints stay, >= 1. Others are deleted after a save, never before it.
      best_metric: name in `metrics`, lower is better; the checkpoint where it is lowest stays too. None: newest only.
    """

    def __init__(self, folder: Path, *, keep_last: int = 3, best_metric: str | None = "loss"):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1")
        self.keep_last, self.best_metric = keep_last, best_metric
        self.root = checkpoints_root(folder)
        self._save: Save | None = None

        def open_folder() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()

        distributed.agreed(open_folder)

    def save(self, step: int, state, *, data_state: dict, metrics: dict[str, float] | None = None) -> None:
        """`begin`, and waits until it is on disk.

        Raises:
          OSError: disk full, folder not writable. Older checkpoints are untouched.
        """
        self.begin(step, state, data_state=data_state, metrics=metrics)
        self.finish()

    def begin(self, step: int, state, *, data_state: dict, metrics: dict[str, float] | None = None) -> None:
        """Copies a state to the host and lets its checkpoint be written, after which ones no longer wanted are deleted.

        A checkpoint already there at this step is replaced, and stays until the new one is whole. Waits for the save
        before. All processes must come by here, each with the state that it has its part of.

        Args:
          step: >= 0.
          state: any pytree of arrays, typed PRNG keys and Python numbers; or of `HostArray`s, which must not change.
          data_state: where the data pipeline is; anything that comes back from JSON as it went in.
          metrics: numbers measured at this step, for `best_metric`.

        Raises:
          OSError: what the save before has failed at.
        """
        self.finish()
        arrays, described = _to_arrays(state)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        record = json.dumps({"arrays": described, "data_state": data_state, "metrics": metrics})
        if json.loads(record)["data_state"] != data_state:
            raise ValueError(f"data_state={data_state} must be plain JSON: string keys, lists, no tuples")
        self._save = Save(lambda key: self._write(key, step, arrays, record))

    def finish(self) -> None:
        """Waits until the save that is on its way is on disk.

        Raises:
          OSError: it could not be written: disk full, folder not writable. Older checkpoints are untouched.
        """
        save, self._save = self._save, None
        if save is not None:
            save.wait()

    @property
    def failed(self) -> bool:
        """Whether `finish` would raise at once."""
        return self._save is not None and self._save.failed

    @property
    def on_its_way(self) -> bool:
        """Whether there is a save that `finish` has not been asked about."""
        return self._save is not None

    def restore_latest(self, like: Tree) -> Restored | None:
        """The newest sound checkpoint, or None. Damaged ones met on the way are set aside as "<step>.damaged".

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s in the structure that was saved. Restored arrays take their dtypes and
            shardings (a struct without one: the default device).

        Raises:
          ValueError: the checkpoint is sound, but of another model.
        """
        found = (self.restore(step, like) for step in reversed(self.steps()))
        return next((restored for restored in found if restored is not None), None)

    def restore(self, step: int, like: Tree) -> Restored | None:
        """The checkpoint of a step; None of a damaged one, which is set aside. As `restore_latest` otherwise."""
        folder = self.root / str(step)
        if not self._is_sound(step):
            return None
        record = read_record(folder)
        return Restored(step, _restore(folder, record, like), record["data_state"], record["metrics"])

    def set_aside(self, step: int, why: str) -> str:
        """Renames a checkpoint that the run shall not go on from, to "<step>.<why>" or "<step>.<why>-2".

        Returns:
          its new name.
        """
        return distributed.agreed(lambda: self._renamed(step, why))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return distributed.agreed(lambda: checkpoint_steps(self.root))

    def latest(self) -> int | None:
        """The newest step that has a checkpoint."""
        return max(self.steps(), default=None)

    def close(self) -> None:
        """As `finish`."""
        self.finish()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, Exception) and distributed.count() == 1:  # others may have failed, or not: who knows
            with contextlib.suppress(OSError):
                self.close()

    def _write(self, key: str, step: int, arrays: dict[str, HostArray], record: str) -> None:
        """Writes a checkpoint, together with the other processes; see `together`."""
        final, partial, replaced = (self.root / f"{step}{suffix}" for suffix in ("", ".partial", ".replaced"))

        def prepare() -> None:
            _remove(partial)
            (partial / "state").mkdir(parents=True)

        def commit(manifest: dict[str, list]) -> None:
            for name, (size, _) in manifest.items():
                if (actual := (partial / name).stat().st_size) != size:
                    raise OSError(f"{name} has {actual} bytes instead of {size}")
            finish()
            (partial / "record.json").write_text(record)
            _write_manifest(partial, manifest)
            if os.path.lexists(final):
                final.rename(replaced)
            partial.rename(final)
            _sync(self.root)

        finish: Finish

        def write() -> dict[str, list]:
            nonlocal finish
            finish = write_pieces(partial / "state", arrays)
            return _digests(partial, partial / "state" / f"ocdbt.process_{distributed.index()}")

        try:
            together(key, prepare, write, commit)
        except OSError as error:
            reason = f"checkpoint not saved, older ones are untouched: {error.strerror or error}"
            raise OSError(error.errno, reason, str(final)) from None
        finally:
            if distributed.is_first():
                self._clear_leftovers()
        if distributed.is_first():
            self._delete_old(step)

    def _is_sound(self, step: int) -> bool:
        """Whether a checkpoint is as it was written, of which each process reads its share; set aside if not."""
        found: str | None = None
        try:
            check_checkpoint(self.root / str(step), share=(distributed.index(), distributed.count()))
        except Damaged as damage:
            found = str(damage)
        damages = [damage for damage in distributed.said_by_all(found) if damage is not None]
        if damages:
            distributed.agreed(lambda: self._set_aside(step, Damaged(damages[0])))
        return not damages

    def _renamed(self, step: int, why: str) -> str:
        names = (f"{step}.{why}" + (f"-{count}" if count > 1 else "") for count in range(1, 1000))
        aside = next(self.root / name for name in names if not os.path.lexists(self.root / name))
        (self.root / str(step)).rename(aside)
        return aside.name

    def _delete_old(self, saved: int) -> None:
        """Deletes what is neither among the newest, nor the best, nor just saved (which may be an older step)."""
        keep = {saved}
        if self.best_metric is not None:
            ranked, damaged = rank_checkpoints(self.root, self.best_metric)
            keep.update(ranked[:1])
            for step, damage in damaged.items():
                self._set_aside(step, damage)
        there = checkpoint_steps(self.root)
        keep.update(there[-self.keep_last :])
        for step in set(there) - keep:
            # Renamed first: killed half-way, what is left must not look like a checkpoint.
            (self.root / str(step)).rename(self.root / f"{step}.partial")
        self._clear_leftovers()

    def _set_aside(self, step: int, damage: Damaged) -> None:
        """Renames a damaged checkpoint, so that a new one can be saved at its step and none is lost by mistake."""
        folder = self.root / str(step)
        try:
            aside = self._renamed(step, "damaged")
        except OSError as error:
            logger.warning("checkpoint %s is damaged (%s); skipped, not renamed: %s", folder, damage, error.strerror)
        else:
            logger.warning("checkpoint %s is damaged (%s); skipped, set aside as %s", folder, damage, aside)

    def _clear_leftovers(self) -> None:
        """Finishes or undoes what a killed process had begun."""
        for path in self.root.iterdir() if self.root.is_dir() else ():
            step, _, suffix = path.name.partition(".")
            if suffix == "replaced" and not os.path.lexists(self.root / step):
                path.rename(self.root / step)  # killed between the two renames of `save`
            elif step.isdecimal() and suffix in ("partial", "replaced"):
                _remove(path)


def _remove(path: Path) -> None:
    """Deletes a folder, or whatever lies in its place, as far as that is allowed."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def restore_params(
    folder: Path, like: Tree, *, step: int | Literal["latest", "best"] = "latest", best_metric: str = "loss"
) -> Tree:
    """The `params` of a run's checkpoint, or their `average` where there is one, for sampling or a notebook.

    Reads only; the run may be going on.

    Args:
      folder: the run's folder.
      like: as in `Checkpoints.restore_latest`, for the `params` part of the state.
      step: a number, "latest", or "best": where `best_metric` is lowest.

    Raises:
      FileNotFoundError: no such checkpoint, or it is damaged.
      ValueError: the checkpoint is sound, but of another model.
    """
    path = choose_checkpoint(folder, step, best_metric=best_metric)
    record = read_record(path)
    part = params_part(record)
    return _restore(path, record, {part: like}, part=part)[part]


def sound_step(folder: Path, step: int | str = "latest", *, best_metric: str = "loss") -> int:
    """The step of the checkpoint that `restore_params` reads.

    Raises:
      FileNotFoundError: no such checkpoint, or it is damaged.
    """
    return int(choose_checkpoint(folder, step, best_metric=best_metric).name)  # type: ignore[arg-type]


def checkpoint_metrics(folder: Path, step: int) -> dict[str, float]:
    """What was measured at the step of a checkpoint; empty where nothing was."""
    return read_record(checkpoints_root(folder) / str(step))["metrics"]


class Kept(NamedTuple):
    """What lies among a run's checkpoints."""

    steps: list[int]
    """Of the checkpoints, oldest first."""
    complaints: list[str]
    """What is wrong, a few words each."""


def look(folder: Path) -> Kept:
    """What checkpoints a run has, and what is wrong with them, by names and sizes: their bytes are not read.

    Changes nothing; the run may be going on, and then its newest checkpoint may be half written.
    """
    root, complaints = checkpoints_root(folder), []
    steps = checkpoint_steps(root)
    for step in steps:
        try:
            check_checkpoint(root / str(step), digests=False)
        except (Damaged, OSError) as damage:
            complaints.append(f"checkpoint {step} is damaged: {damage}")
    for name in sorted(path.name for path in root.iterdir()) if root.is_dir() else []:
        number, _, suffix = name.partition(".")
        if suffix == "partial":
            complaints.append(f"checkpoint {number} is half written")
        elif suffix.startswith("damaged"):
            complaints.append(f"checkpoint {number} was damaged and is set aside")
        elif suffix.startswith("diverged"):
            complaints.append(f"checkpoint {number} had diverged and is set aside")
    return Kept(steps, complaints)


def _write_manifest(folder: Path, known: Written) -> None:
    """Lists size and digest of every file, and has all of it on disk when it returns.

    Args:
      known: of those that are on disk already.
    """
    manifest = _digests(folder, folder, known) | known
    (folder / "manifest.json").write_text(json.dumps(dict(sorted(manifest.items())), indent=1))
    _sync(folder / "manifest.json")
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _sync(path)


def _digests(folder: Path, part: Path, known: Collection[str] = ()) -> Written:
    """Size and digest of the files in a part of a folder, which are on disk when it returns."""
    found = {}
    for path in sorted(part.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[name] = [path.stat().st_size, digest]
            _sync(path)
    return found


def _sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named_leaves(tree) -> dict[str, Any]:
    """The leaves of a pytree by name, in order: "params.layers.0.mixer.in_proj.kernel"."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # An nnx.Variable adds a last ".value", a pure dict of the same arrays does not.
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise ValueError(f"two leaves of the state are called {name!r}")
        named[name] = leaf
    return named


def _describe(leaf) -> tuple[str, list[int]]:
    """dtype and shape of an array, a ShapeDtypeStruct or a Python number."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return leaf.dtype.name, list(leaf.shape)


def _to_arrays(state) -> tuple[dict[str, HostArray], dict[str, tuple[str, list[int]]]]:
    """The state as named arrays of the host, and the description of each."""
    leaves = _named_leaves(state)
    described = {name: _describe(leaf) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not (is_key(leaf) or jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise TypeError(f"{name} is a {type(leaf).__name__}: neither an array nor a number")
    data = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()}
    return to_host(data), described


def _restore(folder: Path, record: dict[str, Any], like: Tree, *, part: str = "") -> Tree:
    """The arrays of a sound checkpoint (those under `part`), each as its twin in `like`."""
    saved = {name: leaf for name, leaf in record["arrays"].items() if not part or f"{name}.".startswith(f"{part}.")}
    leaves = _named_leaves(like)
    _check_same_model(folder, saved, {name: _describe(leaf) for name, leaf in leaves.items()})
    cut = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, HostArray) or _sharding(leaf) is not None}
    asked = {name: leaf if isinstance(leaf, HostArray) else wanted_of(leaf) for name, leaf in cut.items()}
    found = read_pieces(folder / "state", asked)
    whole = {name: saved[name][1] for name in leaves if name not in cut}
    arrays = read_arrays(folder / "state", whole) if whole else {}
    restored = [
        found[name]
        if isinstance(leaf, HostArray)
        else to_devices(found[name], leaf)
        if name in cut
        else _place(arrays[name], leaf)
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _check_same_model(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, one line, unless both have the same names, shapes and kinds of number."""

    def text(described: dict[str, Any], name: str) -> str:
        return "{}{}".format(*described[name]) if name in described else "missing"

    def differ(name: str) -> bool:
        if name not in saved or name not in wanted:
            return True
        (dtype, shape), (wanted_dtype, wanted_shape) = saved[name], wanted[name]
        same_kind = dtype == wanted_dtype or any(kind in dtype and kind in wanted_dtype for kind in ("float", "int"))
        return list(shape) != list(wanted_shape) or not same_kind

    different = [name for name in {**wanted, **saved} if differ(name)]
    different.sort(key=lambda name: not name.startswith("params."))  # the optimizer's follow from them
    if different:
        lines = [f"{name} is {text(saved, name)} there and {text(wanted, name)} here" for name in different[:3]]
        if len(different) > 3:
            lines.append(f"and {len(different) - 3} more")
        raise ValueError(f"checkpoint {folder} is of another model: {'; '.join(lines)}")


def _place(array: np.ndarray, like) -> Any:
    """A restored array as `like` is, which says nothing of devices: key or number, dtype."""
    if is_key(like):
        implementation = jax.random.key_impl(jnp.empty((0,), like.dtype))  # `like` may be a ShapeDtypeStruct
        return jax.random.wrap_key_data(jnp.asarray(array), impl=implementation)
    if not hasattr(like, "dtype"):
        return type(like)(array.item())
    array = array.astype(like.dtype, copy=False)
    if isinstance(like, np.generic):
        return array[()]
    return array if isinstance(like, np.ndarray) else jax.device_put(array)


def _sharding(like) -> jax.sharding.Sharding | None:
    """Where an array must be; None where JAX is free to move it (committed arrays of two device sets do not mix)."""
    return getattr(like, "sharding", None) if getattr(like, "committed", True) else None
