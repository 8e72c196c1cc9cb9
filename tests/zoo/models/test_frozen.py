"""Frozen parameters: what of a model is trained, and what a step may not touch."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.train import Loss, TrainState, make_train_step, split_model
from zoo.models.frozen import Frozen, freeze, thaw


class Two(nnx.Module):
    """Two linear maps, in a list."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, bias_metadata={"decay": False}, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


def arrays(model):
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))}


def test_what_is_not_trained_is_another_kind_of_variable():
    model = Two(nnx.Rngs(0))
    frozen = freeze(model, lambda name: name == "layers.1.bias")
    assert [path for path, _ in nnx.to_flat_state(nnx.state(frozen, nnx.Param))] == [("layers", 1, "bias")]
    assert len(nnx.to_flat_state(nnx.state(frozen, Frozen))) == 3
    assert frozen.layers[1].bias.get_metadata()["decay"] is False
    assert len(nnx.to_flat_state(nnx.state(model, nnx.Param))) == 4  # the one that was given is as it was
    for name, value in arrays(frozen).items():
        assert (value is arrays(model)[name]) == (name != "layers.1.bias"), name  # which a step would give away
    assert nnx.split(thaw(frozen))[0] == nnx.split(model)[0]


def test_a_step_leaves_frozen_parameters_as_they_are_bit_for_bit():
    model = freeze(Two(nnx.Rngs(0)), lambda name: name.startswith("layers.1"))
    model.layers[0].kernel[...] = model.layers[0].kernel[...].at[0, 0].set(-0.0)
    before = jax.tree.map(np.array, arrays(model))
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=1.0, warmup_steps=0), 3, model)
    graphdef, params, rest = split_model(model)

    def loss(model, batch, rngs):
        return Loss(jnp.sum(model(batch["x"]) ** 2), jnp.float32(2))

    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert not any("[0]" in name and "layers" in name.split("[0]")[0] for name in names)
    step = make_train_step(model, loss, optimizer)
    for _ in range(2):
        state, metrics = step(state, {"x": np.ones((2, 3), np.float32)})
    after = arrays(nnx.merge(graphdef, state.params, rest))
    same = {name: before[name].tobytes() == np.asarray(after[name]).tobytes() for name in before}
    assert same == {name: name.startswith("layers.0") for name in before}
    assert 0 < metrics["param_norm"] < np.sqrt(sum(np.sum(np.square(v)) for v in before.values()))
