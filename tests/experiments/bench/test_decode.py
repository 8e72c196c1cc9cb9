"""The benchmark of decoding as a user runs it, at sizes that take a moment."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.bench import decode as bench_decode
from tests.numerics import assert_close

SHAPE = ("--d-model", 16, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--d-ff", 16, "--vocab-size", 24)
TINY = (*SHAPE, "--tokens", 2, "--rounds", 1)
SMALL = bench_decode.Config(d_model=16, layers=2, heads=2, kv_heads=1, d_ff=16, vocab_size=24)


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, bench_decode)


@pytest.mark.slow
def test_a_row_for_each_pattern_and_context_a_picture_and_a_record(tmp_path, run):
    record, picture = tmp_path / "out.json", tmp_path / "out.png"
    status, out, err = run(*TINY, "--contexts", 8, 32, "--json", record, "--plot", picture)
    assert status == 0, err
    figures = json.loads(record.read_text())["figures"]
    patterns = ("attn", "attn linear_attn", "linear_attn")
    assert [(f["context"], f["pattern"]) for f in figures] == [(c, p) for c in (8, 32) for p in patterns]
    assert all(figure["ms"] > 0 and len(figure["rounds"]) == 1 for figure in figures)
    assert len([line for line in out.splitlines() if line.startswith(("|       8", "|      32"))]) == 6
    assert picture.stat().st_size > 0

    # Of each position a layer keeps 8 keys, 8 values, its index and its segment, and of each row two numbers.
    attention = [2 * (4 * (8 + 8 + 1 + 1) * context + 8) for context in (8, 32)]
    # Two heads of 8 x 8, and one position of 8 values, 8 keys and 16 queries, a layer.
    student = 2 * 4 * (2 * 8 * 8 + 8 + 8 + 16)
    found = {pattern: [f["bytes"] for f in figures if f["pattern"] == pattern] for pattern in patterns}
    assert found["attn"] == attention
    assert found["linear_attn"] == [student, student]
    assert found["attn linear_attn"] == [(bytes_ + student) // 2 for bytes_ in attention]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["attn", "attn linear_attn"])
def test_each_token_is_the_last_of_its_context(pattern):
    model = bench_decode.make_models(SMALL)[pattern]
    state = bench_decode.full_state(model, 1, 5)
    attention = state[0]
    assert attention.slot_index.tolist() == [[0, 1, 2, 3, -1]]
    assert attention.next_index.tolist() == [4]
    _, after = jax.jit(model.extend)(jnp.ones((1, 1), jnp.int32), state)
    assert after[0].slot_index.tolist() == [[0, 1, 2, 3, 4]]
    assert not np.any(after[0].key[0, :4])
    assert np.any(after[0].key[0, 4])

    # The position is decoded again and again: attention gives the same each time.
    if pattern == "attn":
        decode = bench_decode.Decoder(model).call(1, 5, tokens=1)
        first = np.asarray(decode())
        assert_close(np.asarray(decode()), first)


def test_the_default_shape_is_that_of_smollm2():
    model = bench_decode.teacher(bench_decode.Config())
    published = jax.eval_shape(lambda: zoo.create("smollm2-135m", rngs=nnx.Rngs(0))).config
    for name in ("d_model", "n_layers", "pattern", "vocab_size"):
        assert getattr(model, name) == getattr(published, name), name
    assert model.mlp.d_ff == published.mlp.d_ff
    assert (model.attn.n_heads, model.attn.n_kv_heads) == (published.attn.n_heads, published.attn.n_kv_heads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", 0), "rounds=0, expected at least 1"),
        (("--contexts", 0), "contexts of at least 1"),
        (("--patterns", "attn", "mamba"), "expected the words attn and linear_attn"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*TINY, *arguments)
    assert status
    assert message in err
    assert "Traceback" not in err
