"""Meshes by flags: what they are, what they refuse."""

import jax
import numpy as np
import pytest

from experiments.causal_lm import Config
from experiments.loop import runs
from experiments.loop.flags import UsageError
from experiments.loop.mesh import (
    AXES,
    MeshConfig,
    check_length,
    check_rows,
    current_mesh,
    make_mesh,
    meshed,
    on_mesh,
    row_groups,
    sharding_of_batch,
    spread,
)
from experiments.loop.train import TrainConfig

# Data 2, fsdp 3, sequence 4: without devices, which these tests do not need.
ABSTRACT = jax.sharding.AbstractMesh((2, 3, 4, 1, 1), AXES)


def test_a_mesh_has_all_axes_and_all_devices():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "sequence": 1, "tensor": 1, "expert": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_what_runs_inside_is_on_the_mesh():
    assert jax.sharding.get_mesh().empty
    assert current_mesh() == make_mesh()

    @meshed
    def fit(config, folder):
        return jax.sharding.get_mesh()

    assert fit(Config(mesh=MeshConfig(data=1, fsdp=-1)), None).shape["fsdp"] == jax.device_count()
    with on_mesh(MeshConfig(data=1, tensor=-1)) as mesh:
        assert current_mesh() == mesh == jax.sharding.get_mesh()
    assert jax.sharding.get_mesh().empty


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, "--mesh.fsdp 0, expected at least 1, or -1 for what the others leave"),
        ({"tensor": -1}, "--mesh.data -1 and --mesh.tensor -1, expected -1 at one axis only"),
    ],
)
def test_axes_that_cannot_be_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


def test_a_mesh_of_another_number_of_devices_is_refused():
    for sizes, message in (
        ({"data": 2, "fsdp": 3}, r"--mesh.data 2 --mesh.fsdp 3: 6 devices, expected 8, the devices there are"),
        ({"fsdp": 3}, r"--mesh.fsdp 3: 3 devices, expected a divisor of 8, the devices there are"),
        ({"data": 1}, r"every axis 1: 1 devices, expected 8, the devices there are"),
    ):
        with pytest.raises(UsageError, match=message.replace(".", r"\.")):
            make_mesh(MeshConfig(**sizes), tuple(range(8)))


def test_rows_and_positions_that_do_not_divide_are_refused():
    assert row_groups(ABSTRACT) == 6
    check_rows(ABSTRACT, 24, 2)
    with pytest.raises(UsageError, match=r"--train.batch-size 20, expected a multiple of .* 2 x 3 x 1 x 2"):
        check_rows(ABSTRACT, 20, 2)
    check_length(ABSTRACT, 64)
    with pytest.raises(UsageError, match=r"--data.seq-len 66, expected a multiple of --mesh.sequence 4"):
        check_length(ABSTRACT, 66)


def test_rows_and_positions_have_axes_of_their_own():
    spec = lambda *shape: tuple(sharding_of_batch(ABSTRACT, shape).spec)  # noqa: E731
    assert spec(6, 64) == (("data", "fsdp", "expert"), "sequence")
    assert spec(6, 65) == (("data", "fsdp", "expert"),)  # tokens and the one behind them
    assert spec(6) == (("data", "fsdp", "expert"),)
    assert spec(6, 32, 32, 3) == (("data", "fsdp", "expert"),)


def test_batches_keep_their_values():
    batch = {"tokens": np.arange(12).reshape(4, 3), "weights": np.ones(4, np.float32)}
    placed = spread(batch, make_mesh())
    assert all(placed[name].sharding.mesh == make_mesh() for name in batch)
    assert all(np.array_equal(placed[name], batch[name]) for name in batch)


def test_the_mesh_is_no_part_of_what_a_run_is():
    one, other = Config(), Config(mesh=MeshConfig(data=1, fsdp=-1))
    assert runs.identity(one) == runs.identity(other)
    assert runs.identity(one) != runs.identity(Config(train=TrainConfig(batch_size=8)))
