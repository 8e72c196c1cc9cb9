"""Rows of a mixture's choices: room for all of them, each block of one expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import normal
from zoo.layers.expert_rows import from_rows, lay_out, lay_out_within_capacity, to_rows


@pytest.mark.parametrize(("n_experts", "size"), [(7, 100), (50, 20)])
def test_blocks_have_room_for_the_worst_case(n_experts, size):
    random = np.random.default_rng(0).integers(0, n_experts, size)
    run = jax.jit(lambda experts: lay_out(experts, n_experts))
    for experts in (random, np.full(size, n_experts - 1), np.arange(size) % n_experts):
        row, group, n_blocks, rows = jax.tree.map(np.asarray, run(jnp.asarray(experts.reshape(1, -1, 1))))
        assert len(group) == n_blocks
        assert len(set(row.ravel())) == size
        assert row.max() < n_blocks * rows
        assert (np.diff(group) >= 0).all()
        assert (group[row.ravel() // rows] == experts).all()


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_a_choice_reads_its_own_position_in_a_block_of_its_expert(capacity_factor):
    n_experts, x = 3, normal(jax.random.key(0), 2, 8, 5, dtype=jnp.float32)
    experts = jnp.asarray(np.random.default_rng(0).integers(0, n_experts + 1, (2, 8, 2)))  # the last stands for none
    if capacity_factor is None:
        layout = lay_out(experts, n_experts)
    else:
        layout = lay_out_within_capacity(experts, n_experts, capacity_factor)
    blocks = to_rows(x, layout)
    here = np.asarray(layout.row < layout.n_blocks * layout.size)
    if capacity_factor is None:
        assert (here == (experts < n_experts)).all()
    of_block = np.arange(n_experts) if layout.group is None else np.asarray(layout.group)
    assert (of_block[np.asarray(layout.row)[here] // layout.size] == np.asarray(experts)[here]).all()
    expected = np.where(here[..., None], np.asarray(x)[:, :, None], 0)
    np.testing.assert_array_equal(from_rows(blocks, layout), expected)
    assert np.count_nonzero(np.asarray(blocks).any(axis=-1)) == here.sum()
