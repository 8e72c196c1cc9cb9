"""Tunes as the few weights that moved most: which these are, that they come back, and that they compose."""

import numpy as np
import pytest
from flax import nnx

import zoo
from tests.zoo.reuse.models import causal
from tests.zoo.reuse.test_adapt import moved
from zoo.reuse.deltas import SparseDelta, load_deltas, save_deltas


def numbers(model):
    return np.concatenate([np.ravel(p[...]) for _, p in nnx.to_flat_state(nnx.state(model, nnx.Param))])


@pytest.mark.slow
def test_the_weights_that_moved_most_are_put_on_again_and_compose(tmp_path):
    base = causal("mamba2/mlp")
    one, two = moved(base, 1), moved(base, 2)
    every = zoo.add_deltas(base, [zoo.sparse_delta(base, one, share=1.0)])
    np.testing.assert_allclose(numbers(every), numbers(one), rtol=1e-6, atol=1e-6)
    few = [zoo.sparse_delta(base, tuned, share=0.1) for tuned in (one, two)]
    change = numbers(zoo.add_deltas(base, few[:1])) - numbers(base)
    whole = np.abs(numbers(one) - numbers(base))
    there = change != 0
    assert there.sum() == int(0.1 * len(whole))
    assert whole[there].min() >= whole[~there].max()
    both = numbers(zoo.add_deltas(base, few, weights=[1.0, 0.5])) - numbers(base)
    other = numbers(zoo.add_deltas(base, few[1:])) - numbers(base)
    np.testing.assert_allclose(both, change + 0.5 * other, atol=1e-6)
    save_deltas(few[0], tmp_path)
    again = load_deltas(tmp_path)
    assert again.keys() == few[0].keys()
    np.testing.assert_array_equal(numbers(zoo.add_deltas(base, [again])), numbers(base) + change)
    assert zoo.sparse_delta(base, base, share=0.5) == {}


def test_what_is_no_delta_is_said(tmp_path):
    base = causal("mamba/mlp")
    with pytest.raises(ValueError, match=r"share=0\.0, expected above 0"):
        zoo.sparse_delta(base, base, share=0.0)
    with pytest.raises(ValueError, match="tuned has other parameters than base"):
        zoo.sparse_delta(base, causal("attn/mlp"))
    delta = {"nothing": SparseDelta(np.array([0]), numbers(base)[:1])}
    with pytest.raises(ValueError, match="nothing is in a delta, and the model has no such parameter"):
        zoo.add_deltas(base, [delta])
    with pytest.raises(ValueError, match="expected one for each of the 1 tunes"):
        zoo.add_deltas(base, [{}], weights=[1.0, 2.0])
    with pytest.raises(FileNotFoundError, match=r"holds no sparse_delta\.safetensors"):
        load_deltas(tmp_path)
