"""Repeated augmentation: which images an epoch has, and how often."""

import numpy as np

from experiments.data.repeats import RepeatedEpochs


def test_each_image_comes_three_times_in_a_row_and_an_epoch_is_as_long_as_ever():
    plan = RepeatedEpochs(30, 6, 3, seed=1)
    assert plan.n_batches == 5
    epochs = [np.concatenate([plan(5 * epoch + step) for step in range(5)]) for epoch in range(2)]
    for rows in epochs:
        assert (rows.reshape(10, 3) == rows[::3, None]).all()
        assert len(set(rows.tolist())) == 10
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())


def test_what_does_not_divide_is_filled_up():
    plan = RepeatedEpochs(10, 4, 3, seed=0)
    rows = np.concatenate([plan(step) for step in range(3)])
    assert rows[10:].tolist() == [-1, -1]
    assert np.unique(rows[:10], return_counts=True)[1].tolist().count(3) == 3
    assert (rows[:10] >= 0).all()


def test_a_step_depends_on_the_seed_alone():
    one, again, other = (RepeatedEpochs(100, 10, 2, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one(12), again(12))
    assert not np.array_equal(one(12), other(12))
