"""A little of everything, where the compilers are installed: the harness tells the truth about what it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.aot.programs import compile_for, placed
from experiments.aot.targets import EXAMPLES, find_target, missing

F32 = jnp.float32


def test_the_memory_of_a_program_is_that_of_its_arrays(target):
    x = jax.ShapeDtypeStruct((1024, 512), F32)
    program = compile_for(target, jax.jit(lambda x, y: (x + y, y), donate_argnums=0), x, x)
    assert program.arguments == 2 * x.size * 4
    assert program.outputs - program.aliased == pytest.approx(x.size * 4, rel=0.01)
    assert program.memory >= 3 * x.size * 4
    assert program.seconds > 0


def test_rows_over_several_devices_lie_there_in_parts(v5e):
    mesh = Mesh(np.array(v5e.devices), ("data",))
    x = jax.ShapeDtypeStruct((1024, 512), F32)
    program = compile_for(v5e, lambda x: jnp.sum(x), placed(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert program.arguments == x.size * 4 // 4
    assert "all-reduce" in program.compiled.as_text()


def test_a_program_too_large_for_the_device_is_refused(v5e):
    x = jax.ShapeDtypeStruct((v5e.memory // 4,), F32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_for(v5e, lambda x: (x[::-1] + 1, x), x)


def test_a_level_is_that_of_one_program(target):
    levels = []

    def function(x):
        levels.append(jax.config.values["jax_optimization_level"])
        return x + 1

    x = jax.ShapeDtypeStruct((1024, 512), F32)
    compile_for(target, function, x, optimization_level="O1")
    compile_for(target, lambda x: function(x), x)
    assert levels == ["O1", jax.config.values["jax_optimization_level"]]


@pytest.mark.aot
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_target_that_is_named_can_be_compiled_for(name):
    if why := missing(name):
        pytest.skip(why)
    target = find_target(name)
    assert target.memory > 10e9
    compile_for(target, lambda x: x @ x, jax.ShapeDtypeStruct((256, 256), jnp.bfloat16))


@pytest.mark.parametrize("name", ["v5", "v5e", "H100:1", ""])
def test_an_unknown_target_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"expected|known|there"):
        find_target(name)


def test_what_is_not_installed_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"v6e:2x2: libtpu is not installed here"):
        find_target.__wrapped__("v6e:2x2")
    assert "jax-cuda12-plugin" in missing("h100")
