"""A training on eight devices, its state cut over them in any way, is the training on one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.places import ROOT

PROGRAM = """
import json, sys
import jax, numpy as np
from flax import nnx

import m2, ssm, zoo
from experiments.causal.next_token import next_token_loss
from experiments.loop.mesh import MeshConfig, make_mesh, spread
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.sharding import make_model
from experiments.loop.train import make_train_step, mean_loss, place_state
from tests.zoo.cut_cases import gathers

nnx.set_graph_mode(False)
meshes, options, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
length, accumulate = options.pop("length", 16), options.pop("accumulate", 1)
given = dict(
    vocab_size=64, d_model=64, n_layers=2 * len(options["pattern"].split()), scan_layers=True,
    mamba=ssm.MambaConfig(d_state=4), mamba2=ssm.Mamba2Config(d_state=8, head_dim=8),
    mamba3=ssm.Mamba3Config(d_state=16, head_dim=8), linear_attn=ssm.LinearAttentionConfig(n_heads=8),
    attn=zoo.AttentionConfig(n_heads=8, n_kv_heads=4), monarch=m2.MonarchMLPConfig(d_ff=64),
    m2=m2.M2Config(l_max=64, filter=m2.HyenaFilterConfig(order=16)),
    moe=zoo.MoEConfig(n_experts=4, top_k=4, d_ff=32, n_shared=1),
)
config = zoo.CausalLMConfig(**given | options)
rng = np.random.default_rng(0)
tokens = rng.integers(0, 64, (8, length + 1))
batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, length), np.float32),
         "segment_ids": np.sort(rng.integers(0, 3, (8, length)), axis=1)}

for number, sizes in enumerate(meshes):
    print("mesh", number, file=sys.stderr, flush=True)
    one = (jax.devices()[0],) if sizes is None else None
    with jax.set_mesh(mesh := make_mesh(MeshConfig(**sizes or {}), one)):
        graphdef, params, rest = make_model(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)), mesh)
        model = nnx.merge(graphdef, params, rest)
        optimizer = make_optimizer(OptimConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-4), 10, model)
        state = place_state(model, optimizer, jax.random.key(0), mesh, average=True)
        step = make_train_step(model, next_token_loss, optimizer, accumulate=accumulate, ema=0.9)
        program = step.program.lower(state, step.rest, spread(batch, mesh)).compile()
        for _ in range(2):
            state, metrics = program(state, step.rest, spread(batch, mesh))
        along = gathers(program.as_text(), length) if mesh.shape["sequence"] > 1 else []
        arrays = jax.tree.leaves((state.params, state.opt_state, state.average))
        held = sum(x.addressable_shards[0].data.nbytes for x in arrays) / sum(x.nbytes for x in arrays)
        trained = nnx.merge(graphdef, zoo.unstack_layers(state.params), rest)
        numbers = [metrics["loss"], metrics["grad_norm"], mean_loss(trained, next_token_loss, [batch])]
    leaves = map(np.asarray, jax.tree.leaves((state.params, state.average)))
    np.savez(f"{folder}/{number}.npz", *leaves, numbers=numbers, held=held, gathers=along)
"""
RESTORED = """
import sys
import jax, numpy as np
from flax import nnx

import zoo
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.host_arrays import HostArray, Stack, to_devices, to_host, wanted
from experiments.loop.mesh import MeshConfig, make_mesh
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.sharding import make_model
from experiments.loop.train import place_state

nnx.set_graph_mode(False)
config = zoo.CausalLMConfig(vocab_size=64, d_model=32, n_layers=2, pattern="mamba2/mlp", scan_layers=True)

def state_on(seed, devices=None, **sizes):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(**sizes), devices)):
        model = nnx.merge(*make_model(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(seed)), mesh))
        return place_state(model, make_optimizer(OptimConfig(), 10, model), jax.random.key(seed), mesh, average=True)

def numbers(state):
    return [np.asarray(jax.random.key_data(x) if x.dtype == state.key.dtype else x) for x in jax.tree.leaves(state)]

saved = state_on(1, data=1, fsdp=8)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(3, zoo.unstack_layers(to_host(saved), split=HostArray.layers), data_state={})
    one = (jax.devices()[0],)
    for devices, sizes, share in ((None, dict(data=2, fsdp=4), 1 / 4), (None, dict(data=8), 1), (one, {}, 1)):
        fresh = state_on(2, devices, **sizes)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
        found = checkpoints.restore_latest(zoo.unstack_layers(wanted(like), split=HostArray.layers)).state
        state = to_devices(zoo.stack_like(found, like, join=Stack), like)
        assert all(x.sharding == y.sharding for x, y in zip(*map(jax.tree.leaves, (state, fresh))))
        largest = max(jax.tree.leaves(state.params), key=lambda x: x.size)
        assert largest.addressable_shards[0].data.size == largest.size * share, sizes
        assert not all(np.array_equal(a, b) for a, b in zip(numbers(saved), numbers(fresh)))
        assert all(np.array_equal(a, b) for a, b in zip(numbers(saved), numbers(state))), sizes
"""


def run_on_devices(devices, program, *arguments):
    """Runs a program on so many simulated devices; returns what it says on stderr."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} " + os.environ.get("XLA_FLAGS", "")
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stderr


def check(folder, meshes, *, devices=8, **options):
    """Trains on each mesh, and compares all after two steps with what one device gives.

    Returns:
      the share of the state that a device holds, of each mesh.
    """
    said = run_on_devices(devices, PROGRAM, json.dumps([None, *meshes]), json.dumps(options), folder)
    rematerialised = [line for line in said.splitlines() if "Involuntary full rematerialization" in line]
    assert not rematerialised, rematerialised
    whole, *cut = [np.load(folder / f"{number}.npz") for number in range(1 + len(meshes))]
    assert whole["held"] == 1
    for one in cut:
        assert not one["gathers"].size, one["gathers"]  # of whole rows, along their positions
        np.testing.assert_allclose(one["numbers"], whole["numbers"], rtol=1e-5)  # loss, gradient, held-out loss
        for name in (name for name in one.files if name.startswith("arr_")):
            assert np.sqrt(np.mean((one[name] - whole[name]) ** 2)) <= 1e-5 * np.sqrt(np.mean(whole[name] ** 2)), name
    return [float(one["held"]) for one in cut]


def test_parameters_are_cut_over_four_devices(tmp_path):
    (share,) = check(tmp_path, [{"fsdp": 2, "tensor": 2}], devices=4, pattern="mamba2/mlp", length=8, d_model=32)
    assert 1 / 4 <= share <= 1.1 / 4


PATTERNS = ("mamba", "mamba2", "mamba3", "linear_attn/moe", "m2/monarch", "attn/mlp", "mamba2*2 attn/mlp")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_eight_devices_train_as_one_does(pattern, tmp_path):
    ways = [{"data": 1, "fsdp": 8}, {"data": 1, "tensor": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
    for way, share in zip(ways, check(tmp_path, ways, pattern=pattern), strict=True):
        expected = 1 / (way.get("fsdp", 1) * way.get("tensor", 1))
        assert expected <= share <= expected + 0.05, way  # vectors are whole, and much of so small a model


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_eight_devices_with_a_part_of_each_row_train_as_one_does(pattern, tmp_path):
    (share,) = check(tmp_path, [{"data": 2, "fsdp": 2, "sequence": 2}], pattern=pattern, length=48, accumulate=2)
    assert 1 / 2 <= share <= 1 / 2 + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_heads_and_positions_are_cut_together(pattern, tmp_path):
    (share,) = check(tmp_path, [{"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}], pattern=pattern, length=48)
    assert 1 / 4 <= share <= 1 / 4 + 0.05


@pytest.mark.slow
def test_micro_batches_and_layers_that_are_not_scanned(tmp_path):
    ways = [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "sequence": 8}]
    check(tmp_path, ways, pattern="mamba2 m2/mlp", length=48, accumulate=2, scan_layers=False)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_restored_on_two_by_four_and_on_one(tmp_path):
    run_on_devices(8, RESTORED, tmp_path)


@pytest.mark.slow
def test_experts_are_cut_over_their_axis(tmp_path):
    ways = [{"fsdp": 2, "expert": 4, "data": 1}, {"expert": 4, "sequence": 2, "data": 1}]
    share, _ = check(tmp_path, ways, pattern="mamba2/moe")
    assert share < 0.4
