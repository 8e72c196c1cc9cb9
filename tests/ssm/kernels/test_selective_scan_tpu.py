"""The kernel of the selective scan against the reference: interpreted, which finds races and memory that nobody wrote.

What the compiler for a TPU says of it is in tests/aot.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ssm
from ssm import reference
from tests.numerics import assert_close, make_positions, value_and_gradients
from tests.ssm.test_scan import make_inputs

scan = functools.partial(ssm.selective_scan, implementation="pallas")


STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr("ssm.platform.INTERPRET", STRICT)


# Two tiles of positions, the second one cut off; a single one with rows to fill up; two tiles of channels, the second
# one cut off. Looking for races takes as long as the rest.
@pytest.mark.parametrize(
    ("sizes", "packed", "interpret"),
    [
        ({"length": 133}, True, True),
        pytest.param({"length": 133}, True, STRICT, marks=pytest.mark.slow),
        pytest.param({"length": 128, "e": 256, "n": 8}, False, STRICT, marks=pytest.mark.slow),
        pytest.param({"length": 1, "b": 1, "e": 1, "n": 1}, False, STRICT, marks=pytest.mark.slow),
        pytest.param({"length": 19, "b": 1, "e": 600, "n": 9}, True, STRICT, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_reference_in_value_and_every_gradient(sizes, packed, interpret, monkeypatch):
    monkeypatch.setattr("ssm.platform.INTERPRET", interpret)
    inputs, positions = make_inputs(**sizes), make_positions(sizes["length"], b=sizes.get("b", 2)) if packed else {}
    expected, expected_gradients = value_and_gradients(reference.selective_scan, inputs, positions)
    out, gradients = value_and_gradients(scan, inputs, positions)
    assert_close(out, expected)
    for name in inputs:
        assert_close(gradients[name], expected_gradients[name], gradient=True, name=name)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_without_gate_and_skip_keeps_a_float32_state():
    inputs = make_inputs(3, b=1)
    inputs = {name: inputs[name] for name in ("u", "delta", "A", "B", "C", "initial_state")}
    low = {k: v.astype(jnp.bfloat16) if k not in ("A", "initial_state") else v for k, v in inputs.items()}
    (y, state), gradients = value_and_gradients(scan, low, {})
    exact = {k: v.astype(jnp.float32) for k, v in low.items()}
    (expected, expected_state), expected_gradients = value_and_gradients(reference.selective_scan, exact, {})
    assert y.dtype == jnp.bfloat16
    assert_close(y, expected)
    assert_close(state, expected_state)
    for name, gradient in gradients.items():
        assert gradient.dtype == low[name].dtype
        assert_close(gradient, expected_gradients[name], tolerance=2e-2, name=name)  # through the rounded output y


def test_under_vmap_one_comes_after_the_other():
    """Here the interpreter's own vmap is broken: it does not know the axis that is added to the grid."""
    twice = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), make_inputs(5, b=1))
    traced = jax.jit(jax.vmap(lambda inputs: scan(**inputs))).trace(twice)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    assert "stablehlo.while" in text


def test_other_platforms_are_refused():
    inputs = make_inputs(5)
    with pytest.raises(NotImplementedError, match=r"implementation='pallas' in a program for cpu: .* TPUs alone"):
        jax.jit(scan).lower(**inputs)
    with pytest.raises(NotImplementedError, match=r"implementation='pallas' in a program for cuda"):
        jax.jit(scan).trace(**inputs).lower(lowering_platforms=("cuda",))


def test_float64_is_refused(x64):
    with pytest.raises(NotImplementedError, match=r"implementation='pallas' computes in float32, not in float64"):
        scan(**make_inputs(5))


def test_one_program_for_three_platforms_has_the_kernel_for_one():
    traced = jax.jit(jax.grad(lambda inputs: ssm.selective_scan(**inputs)[0].sum())).trace(make_inputs(20))
    text = traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()
    assert text.count("tpu_custom_call") == 2
    assert "stablehlo.case" in text


@pytest.mark.parametrize(("axes", "kernels"), [({"data": 2}, 1), ({"data": 2, "sequence": 1}, 1), ({"tensor": 2}, 0)])
def test_over_several_devices_each_has_its_rows_or_xla_divides_a_loop(axes, kernels):
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    rows = NamedSharding(mesh, PartitionSpec("data" if "data" in axes else None))
    inputs = {k: v for k, v in make_inputs(5).items() if k not in ("D", "initial_state")}
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in inputs.items() if k != "A"}
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda inputs, A: ssm.selective_scan(**inputs, A=A)[0]).trace(shapes, inputs["A"])
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels
    assert ("stablehlo.while" in text) == (kernels == 0)
