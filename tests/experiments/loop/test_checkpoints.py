"""A checkpoint comes back bit for bit, or else the one before it: after kills, damage, full disks, on other devices."""

import dataclasses
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.loop import checkpoints
from experiments.loop.checkpoints import Checkpoints, look, restore_params
from experiments.loop.host_arrays import HostArray, Stack
from tests.places import ROOT
from zoo.published.checkpoint_files import Damaged, check_checkpoint, read_arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: int
    params: Any
    opt_state: Any
    key: jax.Array


class Model(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)])


def make_state(seed: int = 0, *, width: int = 4, impl: str = "threefry2x32") -> State:
    """A state after one AdamW step: bfloat16 and float32, empty optax states, a typed key, an int."""
    _, params, _ = nnx.split(Model(width, nnx.Rngs(seed)), nnx.Param, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    updates, opt_state = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    return State(seed, optax.apply_updates(params, updates), opt_state, jax.random.key(seed, impl=impl))


def assert_same_bits(actual, expected):
    def bits(leaf):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return type(leaf), getattr(leaf, "dtype", None), array.shape, array.tobytes()

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert list(map(bits, jax.tree.leaves(actual))) == list(map(bits, jax.tree.leaves(expected)))


def small_state(step: int) -> dict[str, Any]:
    return {"params": {"w": np.full((3, 2), step, np.float32)}, "step": step}


def save_small(folder: Path, *steps: int, **options) -> None:
    with Checkpoints(folder, **options) as run:
        for step in steps:
            run.save(step, small_state(step), data_state={"batch": step})


def assert_restores_small(folder: Path, step: int) -> None:
    restored = Checkpoints(folder).restore_latest(small_state(0))
    assert restored is not None
    assert (restored.step, restored.data_state) == (step, {"batch": step})
    assert_same_bits(restored.state, small_state(step))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_training_state_comes_back_bit_for_bit(tmp_path, impl, abstract):
    state = make_state(3, impl=impl)
    with Checkpoints(tmp_path) as run:
        run.save(3, state, data_state={"epoch": 1, "shards": [0, 5]}, metrics={"loss": 1.25})
    like = make_state(0, impl=impl)
    if abstract:
        like = dataclasses.replace(jax.eval_shape(lambda: like), step=0)
    restored = Checkpoints(tmp_path).restore_latest(like)
    assert_same_bits(restored.state, state)
    assert restored[0] == 3
    assert restored[2:] == ({"epoch": 1, "shards": [0, 5]}, {"loss": 1.25})


def test_every_kind_of_leaf_comes_back(tmp_path):
    state = {
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "numbers": (True, 7, 0.5),
        "numpy": [np.arange(3), np.float64(2.5), np.array(1, np.int8)],
        "empty": {"array": jnp.zeros((0, 3)), "none": None, "tuple": ()},
        "keys": jax.random.split(jax.random.key(0), 3),
        "small": jnp.ones(3, jnp.float8_e4m3fn),
        "names": {3: {"a/b c": jnp.ones(2, bool)}},
    }
    with Checkpoints(tmp_path) as run:
        run.save(1, state, data_state={})
        assert_same_bits(run.restore_latest(state).state, state)


def test_a_restored_state_takes_the_dtype_and_freedom_of_like(tmp_path):
    like = {"free": jnp.zeros(3, jnp.bfloat16), "bound": jax.device_put(jnp.zeros(3), jax.devices()[0])}
    with Checkpoints(tmp_path) as run:
        run.save(1, {"free": jnp.ones(3), "bound": jnp.ones(3)}, data_state={})
        state = run.restore_latest(like).state
    assert state["free"].dtype == jnp.bfloat16
    # Committed to one device, it could not enter a computation with arrays on eight.
    assert (state["free"].committed, state["bound"].committed) == (False, True)


def test_an_nnx_state_and_a_pure_dict_are_the_same_checkpoint(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as run:
        run.save(1, state, data_state={})
    pure = nnx.to_pure_dict(state.params)
    assert_same_bits(restore_params(tmp_path, pure), pure)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    run = Checkpoints(tmp_path / "new")
    assert (run.restore_latest(make_state()), run.steps(), run.latest()) == (None, [], None)
    with pytest.raises(FileNotFoundError, match="no sound checkpoint for step='latest'"):
        restore_params(tmp_path / "elsewhere", {})


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as run:
        for step, loss in enumerate([float("nan"), 5.0, 1.0, 4.0, 2.0, 3.0]):
            run.save(step, small_state(step), data_state={}, metrics={"loss": loss})
        assert run.steps() == [2, 4, 5]
        assert run.latest() == 5
        run.save(6, small_state(6), data_state={})  # without metrics: never the best
        assert run.steps() == [2, 5, 6]
    for step, value in (("best", 2), ("latest", 6), (5, 5)):
        assert_same_bits(restore_params(tmp_path, small_state(0)["params"], step=step), small_state(value)["params"])
    save_small(tmp_path, 7, keep_last=1, best_metric=None)
    assert run.steps() == [7]


def test_a_save_at_an_older_step_is_not_deleted_at_once(tmp_path):
    save_small(tmp_path, 10, 11, 3, keep_last=1)
    assert Checkpoints(tmp_path).steps() == [3, 11]


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    save_small(tmp_path, 1, 2, keep_last=2)

    def fail(folder, known):
        assert Checkpoints(tmp_path).steps() == [1, 2]
        raise OSError(5, "made up")

    monkeypatch.setattr(checkpoints, "_write_manifest", fail)
    with pytest.raises(OSError, match="made up"):
        save_small(tmp_path, 3, keep_last=1)
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_a_second_save_at_a_step_replaces_the_first(tmp_path):
    with Checkpoints(tmp_path) as run:
        run.save(1, small_state(1), data_state={}, metrics={"loss": 2.0})
        run.save(1, small_state(5), data_state={}, metrics={"loss": 1.0})
        restored = run.restore_latest(small_state(0))
    assert (restored.step, restored.metrics) == (1, {"loss": 1.0})
    assert_same_bits(restored.state, small_state(5))
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(operation: int, save, monkeypatch) -> bool:
    """Runs save() up to its n-th change of the disk, and nothing after that. Says whether it came so far."""
    count = 0
    with monkeypatch.context() as patch:

        def counted(function):
            def wrapper(*args, **options):
                nonlocal count
                count += 1
                if count > operation:
                    raise Killed
                return function(*args, **options)

            return wrapper

        for holder, name in (
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "write_text"),
            (checkpoints.shutil, "rmtree"),
            (checkpoints, "write_pieces"),
        ):
            patch.setattr(holder, name, counted(getattr(holder, name)))
        try:
            save()
        except Killed:
            return True
        return False


@pytest.mark.parametrize("step", [2, 3])
def test_a_save_killed_between_any_two_operations_loses_nothing(tmp_path, monkeypatch, step):
    """Saves step 2 over step 2 (in other bits), or step 3 with the deletion of step 1."""
    save_small(tmp_path / "before", 1, 2)
    new = small_state(30)
    seen = set()
    for operation in range(1000):
        folder = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", folder)
        run = Checkpoints(folder, keep_last=2)
        killed = killed_at(operation, lambda run=run: run.save(step, new, data_state={"batch": 30}), monkeypatch)
        restored = Checkpoints(folder, keep_last=2).restore_latest(new)
        old_or_new = new if restored.data_state == {"batch": 30} else small_state(2)
        assert_same_bits(restored.state, old_or_new)
        assert set(os.listdir(folder / "checkpoints")) <= {"1", "2", "3"}
        seen.add(restored.data_state["batch"])
        save_small(folder, 4)
        assert_restores_small(folder, 4)
        if not killed:
            break
    assert operation >= 8
    assert seen == {2, 30}


LIVES = """
import sys
import numpy as np
from experiments.loop.checkpoints import Checkpoints
def state(step):
    return {"params": np.full((300, 100), step), "step": step}
with Checkpoints(sys.argv[1], keep_last=2) as run:
    restored = run.restore_latest(state(0))
    first = restored.step + 1 if restored else 0
    assert restored is None or (restored.state["params"] == restored.step).all()
    print("restored", first - 1, flush=True)
    for step in range(first, 10**6):
        run.save(step, state(step), data_state={})
        print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_again_and_again_goes_on_from_its_last_save(tmp_path):
    random = np.random.default_rng(0)
    last = -1
    for life in range(4):
        arguments = [sys.executable, "-c", LIVES, str(tmp_path)]
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert int(process.stdout.readline().split()[1]) in (last, last + 1)
            process.stdout.readline()  # the first save, which imports orbax
            time.sleep(random.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            lines, errors = process.communicate()
            assert errors == b""
        last = max([last + 1, *(int(line.split()[1]) for line in lines.splitlines())])
        assert last >= life
    assert Checkpoints(tmp_path).latest() in (last, last + 1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def overwrite(path: Path) -> None:
    path.write_bytes(b"{}")


def flip(position: float):
    def flip_byte(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip_byte


def swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate, Path.unlink, zero, overwrite, flip(0), flip(0.5), flip(1), swap_for_folder]
)
def test_damage_to_any_file_is_seen_and_the_older_checkpoint_used(tmp_path, caplog, damage):
    save_small(tmp_path / "sound", 1, 2)
    newest = tmp_path / "sound" / "checkpoints" / "2"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 6
    for count, file in enumerate(files):
        caplog.clear()
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "sound", folder)
        damage(folder / "checkpoints" / "2" / file)
        assert_restores_small(folder, 1)
        (warning,) = caplog.messages
        assert str(folder / "checkpoints" / "2") in warning
        assert file.name in warning or file.name == "manifest.json"
        assert "bytes instead of" in warning or damage is not truncate or file.name == "manifest.json"
        assert "\n" not in warning
        aside = folder / "checkpoints" / "2.damaged"
        assert len([path for path in aside.rglob("*") if path.is_file()]) >= len(files) - 1
        assert Checkpoints(folder).steps() == [1]
        save_small(folder, 2)
        assert_restores_small(folder, 2)
        assert aside.exists()


def test_shares_of_a_checkpoint_are_all_of_it(tmp_path):
    save_small(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    for name in json.loads((folder / "manifest.json").read_text()):
        kept = (folder / name).read_bytes()
        flip(0.5)(folder / name)
        found = []
        for process in range(3):
            try:
                check_checkpoint(folder, share=(process, 3))
            except Damaged as damage:
                found.append(str(damage))
        assert f"{name} has other bytes than were written" in found
        assert len(found) == 1 or name == "record.json"  # which all read
        (folder / name).write_bytes(kept)


def test_an_empty_folder_or_a_file_in_place_of_a_checkpoint_is_damage(tmp_path, caplog):
    for step in (2, 3):
        save_small(tmp_path, 1)
        (tmp_path / "checkpoints" / str(step)).mkdir()
        assert_restores_small(tmp_path, 1)
        (tmp_path / "checkpoints" / str(step)).write_text("")
        assert_restores_small(tmp_path, 1)
        assert "set aside as 2.damaged-2" in caplog.messages[1]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.damaged", "2.damaged-2", "3.damaged", "3.damaged-2"]


def test_links_that_lead_in_a_circle_are_damage(tmp_path, caplog):
    save_small(tmp_path, 1)
    for name in ("2", "3.partial"):
        (tmp_path / "checkpoints" / name).symlink_to(tmp_path / "checkpoints" / name)
    assert "is damaged" in look(tmp_path).complaints[0]
    restore_params(tmp_path, small_state(0)["params"])
    assert_restores_small(tmp_path, 1)
    assert "links that lead in a circle" in caplog.text
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.damaged"]
    (tmp_path / "checkpoints" / "2").symlink_to(tmp_path / "checkpoints" / "2")
    save_small(tmp_path, 2, 3)
    assert_restores_small(tmp_path, 3)


@pytest.mark.parametrize("name", ["manifest.json", "record.json"])
def test_json_that_is_nested_too_deep_is_damage(name, tmp_path, caplog):
    save_small(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "2"
    deep = b"[" * 100_000 + b"]" * 100_000
    (folder / name).write_bytes(deep)
    if name == "record.json":  # which its manifest agrees with
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[name] = [len(deep), hashlib.sha256(deep).hexdigest()]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert look(tmp_path).complaints == [f"checkpoint 2 is damaged: {name} makes no sense"]
    assert_restores_small(tmp_path, 1)
    assert f"{name} makes no sense" in caplog.text


def test_damaged_checkpoints_do_not_count_in_retention(tmp_path):
    save_small(tmp_path, 1, 2, 3)
    for step in (2, 3):
        truncate(tmp_path / "checkpoints" / str(step) / "record.json")
    assert_restores_small(tmp_path, 1)
    save_small(tmp_path, 4, keep_last=2)
    assert Checkpoints(tmp_path).steps() == [1, 4]


def test_a_flipped_metric_cannot_have_the_best_checkpoint_deleted(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as run:
        run.save(1, small_state(1), data_state={}, metrics={"loss": 2.0})
        run.save(2, small_state(2), data_state={}, metrics={"loss": 4.0})
        record = tmp_path / "checkpoints" / "2" / "record.json"
        record.write_text(record.read_text().replace("4.0", "1.0"))
        run.save(3, small_state(3), data_state={}, metrics={"loss": 5.0})
        assert run.steps() == [1, 3]
        assert (tmp_path / "checkpoints" / "2.damaged").exists()


def test_all_damaged_is_no_checkpoint_and_nothing_is_deleted(tmp_path, caplog):
    save_small(tmp_path, 1, 2)
    for step in (1, 2):
        zero(tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt")
    assert Checkpoints(tmp_path).restore_latest(small_state(0)) is None
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1.damaged", "2.damaged"]
    assert len(caplog.messages) == 2


def test_reading_params_changes_nothing_on_disk(tmp_path, caplog):
    save_small(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoints" / "2" / "record.json")
    (tmp_path / "checkpoints" / "3.partial").mkdir()
    before = sorted(os.walk(tmp_path))
    params = restore_params(tmp_path, small_state(0)["params"])
    assert_same_bits(params, small_state(1)["params"])
    assert "2 is damaged (record.json has" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"step=2 .* there are \[1, 2\]"):
        restore_params(tmp_path, small_state(0)["params"], step=2)
    assert sorted(os.walk(tmp_path)) == before


def test_another_model_is_one_line_and_not_damage(tmp_path, caplog):
    with Checkpoints(tmp_path) as run:
        run.save(1, make_state(width=4), data_state={})
        with pytest.raises(ValueError, match="is of another model") as error:
            run.restore_latest(jax.eval_shape(lambda: make_state(width=6)))
        assert run.steps() == [1]
    message = str(error.value)
    assert message.startswith(f"checkpoint {tmp_path / 'checkpoints' / '1'} ")
    assert "params.embed.embedding is float32[7, 4] there and float32[7, 6] here" in message
    assert "more" in message
    assert "\n" not in message
    assert len(message) < 600
    assert caplog.messages == []
    params = nnx.to_pure_dict(make_state().params)
    del params["layers"][1]["bias"]
    with pytest.raises(ValueError, match=r"params.layers.1.bias is bfloat16\[4\] there and missing here$"):
        restore_params(tmp_path, params)
    params["layers"][1]["bias"] = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"params.layers.1.bias is bfloat16\[4\] there and int32\[4\] here$"):
        restore_params(tmp_path, params)
    with pytest.raises(ValueError, match=r"key is key<fry>\[\] there and key<rbg>\[\] here$"):
        Checkpoints(tmp_path).restore_latest(make_state(impl="rbg"))


def test_what_cannot_be_saved_is_refused_before_the_disk_is_touched(tmp_path):
    run = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="data_state"):
        run.save(1, small_state(1), data_state={1: (2,)})
    with pytest.raises(TypeError, match=r"params\.name is a str"):
        run.save(1, {"params": {"name": "x"}}, data_state={})
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_full_disk_is_one_os_error_and_older_checkpoints_stay(tmp_path, caplog):
    save_small(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"older ones are untouched: File too large: '.*/checkpoints/2'") as error:
            Checkpoints(tmp_path).save(2, {"params": np.random.default_rng(0).random(100_000)}, data_state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.__cause__ is None  # nor orbax's page about it
    assert caplog.messages == []
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    save_small(tmp_path, 2)
    assert_restores_small(tmp_path, 2)


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path):
    run = Checkpoints(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="checkpoints"):
        run.save(1, small_state(1), data_state={})


def test_saving_and_restoring_say_nothing_on_the_console(tmp_path, capfd):
    log = logging.getLogger("absl")
    level = log.level
    save_small(tmp_path, 1, 2)
    assert_restores_small(tmp_path, 2)
    assert capfd.readouterr() == ("", "")
    assert log.level == level


def test_orbax_itself_can_read_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    save_small(tmp_path, 1)
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "checkpoints" / "1" / "state")
    assert set(arrays) == {"params.w", "step"}
    assert json.loads((tmp_path / "checkpoints" / "1" / "record.json").read_text())["data_state"] == {"batch": 1}


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from experiments.loop.checkpoints import Checkpoints
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
like = {
    "w": jax.ShapeDtypeStruct((16, 3), np.float32, sharding=split),
    "b": jax.device_put(np.zeros(3, np.float32), whole),
    "key": jax.device_put(jax.random.key(0), whole),
}
with Checkpoints(sys.argv[1]) as run:
    state = run.restore_latest(like).state
    assert state["w"].sharding == split and len(state["w"].addressable_shards) == 8
    assert state["b"].sharding == whole and state["key"].sharding == whole
    run.save(2, jax.tree.map(lambda leaf: leaf, state), data_state={})
"""


@pytest.mark.slow
def test_a_checkpoint_moves_from_one_device_to_eight_and_back(tmp_path):
    state = {"w": jnp.arange(48.0).reshape(16, 3), "b": jnp.arange(3.0), "key": jax.random.key(5)}
    with Checkpoints(tmp_path) as run:
        run.save(1, state, data_state={})
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", EIGHT_DEVICES, str(tmp_path)]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    restored = Checkpoints(tmp_path).restore_latest(state)
    assert restored.step == 2
    assert_same_bits(restored.state, state)


def test_a_save_is_written_while_the_run_goes_on_one_at_a_time(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoints.write_pieces

    def wait_and_write(path, arrays):
        go_on.wait(60)
        return write(path, arrays)

    monkeypatch.setattr(checkpoints, "write_pieces", wait_and_write)
    state = {"params": {"w": jnp.arange(3.0)}, "step": 1}
    with Checkpoints(tmp_path) as run:
        run.begin(1, state, data_state={"batch": 1})
        assert (run.on_its_way, run.failed, run.steps()) == (True, False, [])
        state["params"]["w"].delete()  # its memory is the next step's
        second = threading.Thread(target=lambda: run.begin(2, small_state(2), data_state={"batch": 2}))
        second.start()
        second.join(0.1)
        assert second.is_alive()  # it waits for the first
        go_on.set()
        second.join(60)
        assert run.steps()[0] == 1
    assert_restores_small(tmp_path, 2)
    first = read_arrays(tmp_path / "checkpoints" / "1" / "state", {"params.w": [3]})
    np.testing.assert_array_equal(first["params.w"], range(3))


def test_what_a_save_behind_the_run_failed_at_is_said_by_the_next(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as run:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_pieces", lambda *_: os.open(tmp_path / "missing" / "file", os.O_RDONLY))
            run.begin(1, small_state(1), data_state={})
            with pytest.raises(OSError, match="checkpoint not saved, older ones are untouched: No such file"):
                run.finish()
        run.save(2, small_state(2), data_state={"batch": 2})
    assert_restores_small(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


@pytest.mark.parametrize("missing", ["a piece", "an array"])
def test_what_no_process_has_written_is_noticed_before_the_commit(tmp_path, missing):
    """As of two processes, of which the second has written nothing."""
    pieces = {} if missing == "an array" else {((0, 2), (0, 3)): np.ones((2, 3), np.float32)}
    cut = HostArray((4, 3), np.dtype(np.float32), pieces, (2, 3))
    with Checkpoints(tmp_path) as run, pytest.raises(OSError, match=r"not written: params\.w"):
        run.save(1, {"params": {"w": cut}, "step": 1}, data_state={})
    assert os.listdir(tmp_path / "checkpoints") == []


def test_pieces_are_read_as_they_are_asked_for(tmp_path):
    """Of a stack of layers, whatever pieces it was written in: a slice is not the whole."""
    whole = np.arange(48.0, dtype=np.float32).reshape(2, 4, 6)
    halves = {((0, 2), (0, 4), (c, c + 3)): whole[:, :, c : c + 3] for c in (0, 3)}
    written = HostArray(whole.shape, whole.dtype, halves, (2, 4, 3)).layers()
    with Checkpoints(tmp_path) as run:
        run.save(1, {"params": dict(enumerate(written))}, data_state={})
        asked = HostArray(
            whole.shape, jnp.dtype("bfloat16"), {((0, 2), (r, r + 2), (0, 6)): None for r in (0, 2)}, (2, 2, 6)
        )
        found = run.restore(1, {"params": dict(enumerate(asked.layers()))}).state["params"]
    stack = Stack([found[0], found[1]])
    for bounds in asked.pieces:
        np.testing.assert_array_equal(stack[bounds], whole[tuple(slice(*ends) for ends in bounds)].astype(jnp.bfloat16))
