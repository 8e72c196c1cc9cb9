"""The benchmark of length as a user runs it, at sizes that take a moment."""

import functools
import json
import os
import subprocess
import sys

import pytest

from experiments.bench import length
from tests.places import ROOT

GRADIENTS = """
import sys
import jax, numpy as np
from flax import nnx

import zoo
from experiments.bench.length import model_config
from experiments.causal.next_token import next_token_loss
from experiments.loop.mesh import MeshConfig, make_mesh, spread

nnx.set_graph_mode(False)
pattern, length = sys.argv[1], 1 << 14
ids = np.random.default_rng(0).integers(0, 256, (1, length + 1)).astype(np.int32)
batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((1, length), np.float32)}
_, params, rest = nnx.split(zoo.CausalLM(model_config(pattern, length), rngs=nnx.Rngs(0)), nnx.Param, ...)

def gradient(at_once, devices):
    model = nnx.eval_shape(lambda: zoo.CausalLM(model_config(pattern, length, at_once), rngs=nnx.Rngs(0)))
    graphdef = nnx.split(model, nnx.Param, ...)[0]

    def loss(params, rest, batch):
        return next_token_loss(nnx.merge(graphdef, params, rest), batch | {"segment_ids": None}, None).total / length

    config = MeshConfig(data=1, sequence=devices)
    with jax.set_mesh(mesh := make_mesh(config, tuple(jax.devices()[:devices]))):
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params, rest, spread(batch, mesh)))

whole = gradient(0, 1)
for at_once, devices in ((1024, 1), (0, 8)):
    pairs = zip(jax.tree.leaves_with_path(gradient(at_once, devices)), jax.tree.leaves(whole), strict=True)
    for (path, other), one in pairs:
        error, size = (np.sqrt(np.mean(np.square(x, dtype=np.float64))) for x in (other - one, one))
        print(at_once, devices, jax.tree_util.keystr(path), error / size)
        assert error <= 1e-5 * size, (at_once, devices, path, error / size)
"""


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, length)


def test_a_row_for_each_length(tmp_path, run):
    path = tmp_path / "out.json"
    status, out, err = run("--patterns", "-/mlp", "--lengths", 32, 64, "--run", "--json", path)
    assert status == 0, err
    figures = json.loads(path.read_text())["figures"]
    assert [(f["length"], f["pieces"]) for f in figures] == [(32, 1), (64, 1)]
    assert all(f["memory_bytes"] > 0 and f["seconds"] > 0 and f["loss"] > 0 for f in figures)
    assert len([line for line in out.splitlines() if line.startswith("| -/mlp |")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths",), "lengths=(), expected at least one"),
        (("--lengths", 0), "lengths=(0,), expected multiples of pieces=(1,)"),
        (("--pieces", 1000), "pieces=(1000,), expected 1 to 1, the devices there are"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba/mlp", "mamba2/mlp", "m2/monarch"])
def test_the_gradient_of_a_row_in_parts_and_over_eight_devices_is_that_of_the_whole_row(pattern):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", GRADIENTS, pattern]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
