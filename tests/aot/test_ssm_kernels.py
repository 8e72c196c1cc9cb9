"""The kernels of `ssm`, compiled by Mosaic: what interpret mode lets pass, the compiler for a TPU may refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ssm
from experiments.aot.programs import compile_for, placed
from tests.aot.conftest import found

pytestmark = pytest.mark.aot
MIB = 2**20


def scan_shapes(b=8, length=2048, e=1536, n=16, *, dtype=jnp.bfloat16, packed=False):
    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    f32 = jnp.float32
    shapes = {name: shape(b, length, e) for name in ("u", "delta", "z")}
    shapes |= {name: shape(b, length, n) for name in ("B", "C")}
    shapes |= {"A": shape(e, n, dtype=f32), "D": shape(e, dtype=f32), "initial_state": shape(b, e, n, dtype=f32)}
    if packed:
        shapes |= {"mask": shape(b, length, dtype=bool), "segment_ids": shape(b, length, dtype=jnp.int32)}
    return shapes


def scan_gradient(shapes, names=("u", "delta", "A", "B", "C")):
    """Of both outputs, in what is named."""

    def total(chosen, others):
        y, state = ssm.selective_scan(**chosen, **others)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    chosen = {name: shapes[name] for name in names}
    return jax.grad(total), chosen, {name: x for name, x in shapes.items() if name not in names}


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"packed": True},
        {"b": 1, "length": 300, "e": 640, "n": 9, "packed": True, "dtype": jnp.float32},  # tiles cut off
        {"b": 2, "length": 7, "e": 24, "n": 4},
    ],
)
def test_selective_scan_compiles_with_everything_that_it_takes(name, sizes):
    shapes = scan_shapes(**sizes)
    floating = [name for name, x in shapes.items() if jnp.issubdtype(x.dtype, jnp.floating)]
    program = compile_for(found(name), *scan_gradient(shapes, floating))
    text = program.compiled.as_text()
    assert text.count("tpu_custom_call") >= 2
    assert " while(" not in text


def test_the_memory_of_selective_scan_is_small_and_grows_with_the_length(v5e):
    def of_gradient(length):
        shapes = scan_shapes(length=length)
        shapes = {name: shapes[name] for name in ("u", "delta", "A", "B", "C")}
        return compile_for(v5e, *scan_gradient(shapes)).temporaries

    assert of_gradient(2048) < 64 * MIB
    # The gradient in y, one state a tile of 128 positions, and gradients of B and C by tiles of channels.
    u = scan_shapes(length=65_536)["u"]
    assert of_gradient(65_536) < 1.5 * u.size * u.dtype.itemsize


@pytest.mark.parametrize("axis", ["data", "sequence"])
def test_four_devices_have_a_part_of_the_rows_or_of_the_positions_in_the_kernel(v5e, axis):
    axes = ("data", "fsdp", "sequence", "tensor", "expert")
    mesh = Mesh(np.array(v5e.devices).reshape([4 if name == axis else 1 for name in axes]), axes)
    spec = ("data",) if axis == "data" else (None, "sequence")
    whole = ("A", "D") if axis == "data" else ("A", "D", "initial_state")
    shapes = {
        name: placed(x, NamedSharding(mesh, PartitionSpec(*(() if name in whole else spec))))
        for name, x in scan_shapes().items()
    }
    with jax.set_mesh(mesh):
        program = compile_for(v5e, *scan_gradient(shapes))
    assert "tpu_custom_call" in program.compiled.as_text()
    assert program.temporaries < 16 * MIB
