"""Whole steps of models, as RESULTS.md has them, compile within two minutes of CPU time and fit their devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.aot.programs import compile_for, placed
from experiments.aot.report import DEVICES, ITEMS, compile_item
from experiments.loop.mesh import MeshConfig, make_mesh, sharding_of_batch
from experiments.loop.vocabulary_loss import vocabulary_loss
from tests.aot.conftest import found
from zoo.layers.softmax_attention import softmax_attention

pytestmark = pytest.mark.aot
MIB = 2**20
EXAMPLES = ("v5e:2x2", "h100")
# Of a v5e one of each kind: the others take 70 to 180 CPU seconds each.
QUICK = ("mamba-130m train", "mamba2-130m train", "m2-bert-80m train", "vim-small train")


def cases():
    for device in DEVICES:
        for item in ITEMS:
            name = f"{item.name} {item.what}"
            quick = device == "h100" or (device == "v5e:2x2" and (name in QUICK or item.what == "decode"))
            yield pytest.param(device, item, id=f"{device} {name}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("device", "item"), list(cases()))
def test_a_step_compiles_and_fits(device, item):
    found(device)  # or is skipped
    step = compile_item(item, device)
    assert step.fits, step.refused
    if item.what == "decode":  # what is carried from token to token is changed where it lies
        assert step.program.temporaries < 128 * MIB
    assert step.program.seconds < 120


@pytest.mark.parametrize("device", EXAMPLES)
def test_the_loss_over_a_vocabulary_keeps_no_logits_and_gathers_no_rows(device):
    """16,384 tokens a device with 50,280 logits each would be 3.1 GiB in float32; and each device has its own rows."""
    target = found(device)
    mesh = make_mesh(MeshConfig(), target.devices)
    rows, vocabulary = 8 * len(target.devices), 50_280

    def loss(weight, hidden, targets, weights):
        def head(x):
            return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)

        return vocabulary_loss(head, hidden, targets, weights, vocabulary).total

    def batch(dtype, *more):
        shape = (rows, 2048, *more)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of_batch(mesh, shape))

    weight = placed(jax.ShapeDtypeStruct((768, vocabulary), jnp.float32), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        arguments = (weight, batch(jnp.bfloat16, 768), batch(jnp.int32), batch(jnp.float32))
        program = compile_for(target, jax.grad(loss, argnums=(0, 1)), *arguments)
    assert program.temporaries < 1.5 * 2**30
    text = program.compiled.as_text()
    assert "all-gather" not in text
    assert text.count(" all-reduce(") <= 1  # of the gradient in the weights: once, and not for each part
    assert np.prod(weight.shape) * 4 < program.memory


def test_attention_over_long_rows_is_not_of_their_square(target):
    """What `block_attention` promises, on the platforms too: twice the length is twice the memory."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.bfloat16)
        gradient = jax.grad(lambda q, k, v: jnp.sum(softmax_attention(q, k, v, causal=True).astype(jnp.float32)))
        return compile_for(target, gradient, x, x, x).temporaries

    assert temporaries(16_384) < 3 * max(temporaries(8_192), 2**24)
