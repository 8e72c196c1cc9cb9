"""Training steps cut over devices that are not here: they compile, and a device holds its part and no more."""

import dataclasses
import math

import jax
import pytest

import ssm
import zoo
from experiments.aot.programs import compile_for
from experiments.aot.steps import make_step
from experiments.loop.mesh import MeshConfig, make_mesh
from tests.aot.conftest import found
from zoo.models.build import abstract

GIB = 2**30
LARGE = {"dtype": "bfloat16", "scan_layers": True, "remat": True}


def train_on(target, config, sizes, *, batch_size, seq_len):
    mesh = make_mesh(MeshConfig(**sizes), target.devices)
    with jax.set_mesh(mesh):
        step = make_step(config, mesh, "train", batch_size=batch_size, seq_len=seq_len)
        return compile_for(target, step.program, *step.arguments)


@pytest.mark.aot
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 1, "tensor": 4}])
def test_a_device_holds_its_part_of_the_state(sizes, v5e):
    config = zoo.CausalLMConfig(
        d_model=256, n_layers=4, vocab_size=1024, pattern="mamba2", mamba2=ssm.Mamba2Config(d_state=64), **LARGE
    )
    program = train_on(v5e, config, sizes, batch_size=4, seq_len=256)
    n_params = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract(config)))
    assert (
        3 * n_params <= program.arguments <= 1.1 * 3 * n_params
    )  # float32 three times, a quarter of it, and vectors whole


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "device", "sizes", "rows", "length"),
    [
        ("mamba-2.8b", "v5p:2x2x2", {"fsdp": 8}, 8, 2048),
        ("mamba2-hybrid-8b", "v5p:2x2x2", {"fsdp": 8}, 8, 2048),
        ("mamba2-1.3b", "v5p:2x2x4", {"sequence": 16}, 1, 2**18),
    ],
)
def test_a_large_model_trains_in_the_memory_of_the_devices(name, device, sizes, rows, length):
    target, config = found(device), dataclasses.replace(zoo.presets[name], **LARGE)
    program = train_on(target, config, sizes, batch_size=rows, seq_len=length)
    print(f"{name} on {device}: {program.arguments / GIB:.1f} + {program.temporaries / GIB:.1f} GiB a device")
    assert program.memory < target.memory
