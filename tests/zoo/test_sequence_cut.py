"""Rows whose positions are cut over devices give what one device gives; see `cut_cases.py` for the cases."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm
import zoo
from tests.places import ROOT
from zoo.stack import mixers


def run_cases(*names):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-m", "tests.zoo.cut_cases", *names],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_operations_on_eight_devices_give_what_one_gives():
    run_cases("ssd packed 37", "causal_conv1d packed 6", "fft_conv packed 6", "attention by heads plain 6")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("selective_scan",),
        ("ssd", "linear_attention"),
        ("trapezoid",),
        ("causal_conv1d",),
        ("fft_conv",),
        ("attention",),
        ("causal mamba",),
        ("causal linear_attn", "causal m2", "causal attn", "causal zamba2"),
        ("two-sided",),
        ("pooled",),
        ("image",),
        ("exchanges",),
    ],
    ids=lambda names: names[0],
)
def test_everything_on_eight_devices_gives_what_one_gives(names):
    run_cases(*names)


@pytest.fixture
def cut_mesh():
    """A mesh that cuts rows over 8 devices, none of which need be here: for shapes alone."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("sequence",))):
        yield


def shape_of_outputs(pattern, length=16):
    config = zoo.CausalLMConfig(d_model=16, n_layers=1, pattern=pattern, vocab_size=16, moe=zoo.MoEConfig(n_experts=2))
    model = nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda model, ids: model(ids), model, jnp.zeros((1, length), jnp.int32)).shape


class Unaware(ssm.Mixer):
    """A mixer that says nothing of rows that are cut."""

    def __init__(self, d_model, config, **_):
        pass

    def _mix(self, x, state, mask, segment_ids):
        return x, state


@pytest.mark.usefixtures("cut_mesh", "unchecked")
def test_what_cannot_run_on_a_part_of_the_positions_is_named(monkeypatch):
    monkeypatch.setitem(mixers.MIXERS, "unaware", mixers.Kind(Unaware, ssm.MambaConfig()))
    with pytest.raises(NotImplementedError, match=r"unaware on a mesh that cuts rows .* expected --mesh.sequence 1"):
        shape_of_outputs("unaware/mlp")
    with pytest.raises(NotImplementedError, match=r"capacity_factor=1.0 counts the positions of whole rows, expected"):
        shape_of_outputs("mamba/moe[capacity_factor=1.0]")
    assert shape_of_outputs("unaware", length=1) == (1, 1, 16)  # a token is on every device
