"""The loss of rows that go on is that of the whole, and a balance of experts is trained with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ssm
import zoo
from experiments.causal.next_token import continued_loss, next_token_loss
from experiments.loop.train import TrainState, make_train_step, split_model
from tests.numerics import assert_close, with_random_parameters


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba", *(pytest.param(p, marks=pytest.mark.slow) for p in ("mamba2", "mamba3"))])
def test_the_carried_loss_over_pieces_is_that_of_the_whole(pattern):
    config = zoo.CausalLMConfig(
        **{"d_model": 8, "n_layers": 2, "vocab_size": 17, "pattern": pattern},
        mamba=ssm.MambaConfig(d_state=4),
        mamba2=ssm.Mamba2Config(d_state=4, head_dim=4),
        mamba3=ssm.Mamba3Config(d_state=4, head_dim=4),
    )
    model = with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    ids, segments = rng.integers(0, 17, (2, 13)), np.cumsum(rng.random((2, 12)) < 0.2, axis=1)
    whole = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": segments, "weights": np.ones((2, 12))}
    whole = jax.tree.map(jnp.asarray, whole)
    expected = next_token_loss(model, whole, None).total
    state, totals = jax.tree.map(lambda x: x + 1, model.init_state(2)), []  # what the first piece does not go on from
    for start in (0, 4, 8):
        piece = {name: values[:, start : start + 4] for name, values in whole.items()}
        goes_on = jnp.asarray(segments[:, start] == segments[:, start - 1] if start else [False, False])
        loss, state = continued_loss(model, piece | {"continues": goes_on}, None, state)
        totals.append(loss.total)
    assert_close(sum(totals), expected)


@pytest.mark.slow
def test_a_mixture_of_experts_trains_and_its_balance_is_part_of_the_loss():
    config = zoo.CausalLMConfig(
        d_model=16,
        n_layers=2,
        pattern="mamba2/moe",
        vocab_size=11,
        mamba2=ssm.Mamba2Config(d_state=4, head_dim=8, chunk_size=8),
        moe=zoo.MoEConfig(n_experts=4, d_ff=8, n_shared=1, balance_weight=0.02, z_weight=0.001),
        scan_layers=True,
        remat=True,
    )
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    optimizer = optax.adam(1e-2)
    step = make_train_step(model, next_token_loss, optimizer)
    graphdef, params, rest = split_model(model)
    text = (np.arange(4)[:, None] + np.arange(17)) % 11
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "segment_ids": np.zeros((4, 16), int)}
    batch["weights"] = np.ones((4, 16), np.float32)
    auxiliary = jax.jit(lambda params: nnx.merge(graphdef, params, rest).run(jnp.asarray(batch["tokens"]))[1])(params)
    state, records = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0)), []
    for _ in range(12):
        state, metrics = step(state, batch)
        records.append(metrics)
    losses, auxiliaries = ([float(record[name]) for record in records] for name in ("loss", "auxiliary_loss"))
    assert losses[-1] < 0.7 * losses[0]
    assert auxiliaries[0] == pytest.approx(float(auxiliary), rel=1e-5)
    assert np.isfinite(auxiliaries).all()
    assert min(auxiliaries) > 2 * 2 * 0.02  # two blocks, each at least top_k times its weight
