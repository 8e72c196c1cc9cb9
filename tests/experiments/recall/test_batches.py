"""Batches of synthetic tasks: by seed and step alone, and held out from every run."""

import json

import numpy as np
import pytest

from experiments.recall.batches import Batches, held_out
from experiments.recall.tasks import MQAR
from tests.experiments.recall.test_tasks import SMALL, TASKS


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("data", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(data):
    first = Batches(data, batch_size=8, seed=3)
    batches = [next(first) for _ in range(5)]
    again = Batches(data, batch_size=8, seed=3)
    again.set_state(json.loads(json.dumps({"step": 3})))
    assert equal(next(again), batches[3])
    assert equal(next(again), batches[4])
    assert again.get_state() == first.get_state()
    assert not equal(batches[0], batches[1])
    assert not equal(next(Batches(data, batch_size=8, seed=4)), batches[0])


def test_held_out_rows_are_the_same_each_time_and_no_training_rows():
    data = SMALL[MQAR]
    one, two = (list(held_out(data, batch_size=4, n_batches=2)) for _ in range(2))
    assert equal(one[0], two[0])
    assert not equal(one[0], one[1])
    trained = [next(Batches(data, batch_size=4, seed=seed)) for seed in (0, 1, 2)]
    assert not any(equal(batch, other) for batch in one for other in trained)
