"""Generation: the cache gives what a fresh pass would, and a row in a batch what it would get alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from m2 import M2Config
from tests.numerics import with_random_parameters
from zoo.models.generate import _advance, _decode, _prefill, filter_logits

VOCAB = 17  # in 24 rows
TINY = zoo.CausalLMConfig(
    d_model=8,
    n_layers=2,
    vocab_size=VOCAB,
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=12),
)
ALIBI = zoo.AttentionConfig(n_heads=2, position="alibi")
WINDOW = zoo.AttentionConfig(n_heads=2, window=4)
VARIANTS = {
    "mamba": {"pattern": "mamba"},
    "rope": {"pattern": "attn/mlp"},
    "alibi": {"pattern": "attn/mlp", "attn": ALIBI},
    "window": {"pattern": "attn/mlp", "attn": WINDOW},
    "m2": {"pattern": "m2 m2/monarch", "m2": M2Config(l_max=20, n_filters=4)},
    "hybrid": {"pattern": "mamba attn/mlp"},
    "parallel, shared": {"pattern": "mamba+attn/mlp@a"},
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8]]


def make_model(kind=zoo.CausalLM, **options):
    config = dataclasses.replace(TINY, **options)
    return with_random_parameters(lambda: kind(config, rngs=nnx.Rngs(0)), seed=1)


@pytest.fixture(scope="module")
def hybrid():
    return make_model(**VARIANTS["hybrid"])


@pytest.fixture(scope="module")
def logits_of(hybrid):
    """Logits after a prompt, in numpy and without a cache: the model sees the prompt and rubbish behind it."""
    call = jax.jit(hybrid)

    def last_logits(prompt):
        ids = np.full((1, 16), 11)
        ids[0, : len(prompt)] = prompt
        return np.asarray(call(ids))[0, len(prompt) - 1, :VOCAB].astype(np.float64)

    return last_logits


def recompute(model, prompts, max_new_tokens):
    """Greedy decoding without a cache: every token from a pass over the whole row, which sees nothing behind it."""
    call = jax.jit(model)
    ids = np.concatenate([prompts, np.zeros((len(prompts), max_new_tokens), int)], axis=1)
    for t in range(prompts.shape[1], ids.shape[1]):
        ids[:, t] = np.asarray(call(ids))[:, t - 1, :VOCAB].argmax(axis=-1)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_equals_recomputed_greedy(variant):
    model = make_model(**VARIANTS[variant])
    prompts = np.array([PROMPTS[0], PROMPTS[2]])
    expected = recompute(model, prompts, 10)
    assert len(set(expected[:, 5:].ravel())) > 2  # not the same token over and over
    assert np.array_equal(zoo.generate(model, prompts, 10), expected)


SAMPLED = zoo.Sampling(temperature=1.5, top_k=12, top_p=0.95)


@pytest.mark.parametrize(
    ("variant", "sampling"),
    [("hybrid", zoo.Sampling()), ("hybrid", SAMPLED), ("window", zoo.Sampling())],
    ids=["hybrid greedy", "hybrid sampled", "window greedy"],
)
def test_a_row_of_a_batch_of_unequal_prompts_is_what_it_would_be_alone(variant, sampling):
    model, key = make_model(**VARIANTS[variant]), jax.random.key(0)
    batch = zoo.generate(model, PROMPTS, 8, sampling=sampling, key=key)
    for row, prompt in enumerate(PROMPTS):
        alone = zoo.generate(model, prompt, 8, sampling=sampling, key=jax.random.fold_in(key, row)[None])
        assert np.array_equal(alone[0, : len(prompt)], prompt)
        assert np.array_equal(batch[row, 5 - len(prompt) :], alone[0])


def test_prompts_come_as_a_list_an_array_or_a_batch(hybrid):
    expected = zoo.generate(hybrid, [PROMPTS[0]], 8)
    assert expected.shape == (1, 13)
    for prompt in (PROMPTS[0], tuple(PROMPTS[0]), np.array(PROMPTS[0]), jnp.asarray([PROMPTS[0]])):
        assert np.array_equal(zoo.generate(hybrid, prompt, 8), expected)


@pytest.mark.parametrize("short", [[0, 0, 0, 9, 2], [9, 2, 0, 0, 0]], ids=["left", "right"])
def test_a_mask_on_either_side_is_a_shorter_prompt(hybrid, short):
    padded = np.array([PROMPTS[0], short, PROMPTS[2]])
    out = zoo.generate(hybrid, padded, 8, mask=padded != 0)
    assert np.array_equal(out, zoo.generate(hybrid, PROMPTS, 8))
    assert np.array_equal(out[:, :5], [PROMPTS[0], [0, 0, 0, 9, 2], PROMPTS[2]])


@pytest.mark.parametrize("sampling", [zoo.Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_yields_what_generate_returns(hybrid, sampling):
    key = jax.random.key(0)
    whole = zoo.generate(hybrid, PROMPTS, 8, sampling=sampling, key=key)
    stream = list(zoo.generate_stream(hybrid, PROMPTS, 8, sampling=sampling, key=key))
    assert all(isinstance(tokens, np.ndarray) and tokens.shape == (3,) for tokens in stream)
    assert np.array_equal(np.stack(stream, axis=1), whole[:, 5:])


class CountingLM(zoo.CausalLM):
    """A model that counts the calls which a compiled loop makes."""

    calls = 0

    def extend(self, ids, state, **kwargs):
        def count():
            CountingLM.calls += 1

        jax.debug.callback(count)
        return super().extend(ids, state, **kwargs)


def test_a_row_ends_at_its_first_end_token_and_the_loop_with_the_last_row(hybrid):
    free = np.asarray(zoo.generate(hybrid, PROMPTS, 8))[:, 5:]
    eos = [int(free[0, 2]), int(free[1, 5]), int(free[2, 0])]
    ends = [int(np.isin(row, eos).argmax()) for row in free]
    assert ends == [2, 5, 0]  # three rows, three ends, none the last step
    expected = np.stack([np.where(np.arange(8) > end, 13, row) for row, end in zip(free, ends, strict=True)])

    out = zoo.generate(hybrid, PROMPTS, 8, eos_id=eos, pad_id=13)
    assert np.array_equal(out[:, 5:], expected)
    assert np.array_equal(out[1, :5], [13, 13, 13, 9, 2])
    out = zoo.generate(hybrid, PROMPTS, 8, eos_id=eos)  # the first end token pads unless told otherwise
    assert np.array_equal(out[:, 5:], np.where(expected == 13, eos[0], expected))

    stream = np.stack(list(zoo.generate_stream(hybrid, PROMPTS, 8, eos_id=eos, pad_id=13)), axis=1)
    assert np.array_equal(stream, expected[:, :6])

    counting = make_model(CountingLM, **VARIANTS["hybrid"])
    out = zoo.generate(counting, PROMPTS, 8, eos_id=eos, pad_id=13)
    jax.effects_barrier()
    assert np.array_equal(out[:, 5:], expected)
    assert CountingLM.calls == 1 + 6  # the prompt, then as many steps as the last row took


def test_one_end_token_may_be_a_number(hybrid):
    free = np.asarray(zoo.generate(hybrid, PROMPTS, 8))[:, 5:]
    out = zoo.generate(hybrid, PROMPTS, 8, eos_id=int(free[1, 5]))
    assert np.array_equal(out, zoo.generate(hybrid, PROMPTS, 8, eos_id=[int(free[1, 5])]))
    assert np.array_equal(out[1, 5:], np.where(np.arange(8) > 5, free[1, 5], free[1]))


def allowed(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Which logits the filters leave, one after the other, in plain numpy."""
    keep = np.ones(len(logits), bool)
    if top_k:
        keep &= logits >= np.sort(logits)[-min(top_k, len(logits))]
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        order = order[keep[order]]
        probability = np.exp(logits[order] - logits.max())
        reached = np.cumsum(probability / probability.sum())
        needed = int(np.argmax(reached >= top_p)) + 1 if np.any(reached >= top_p) else len(order)
        keep &= logits >= logits[order[needed - 1]]
    if min_p:
        keep &= np.exp(logits - logits.max()) >= min_p
    return keep


@pytest.mark.parametrize("top_k", [0, 1, 3, 40])
def test_filters_leave_what_their_definitions_leave(top_k):
    filters = jax.jit(filter_logits)
    rng = np.random.default_rng(top_k)
    for scale in (0.3, 1, 4, 50):
        logits = (scale * rng.standard_normal((5, 40))).astype(np.float32)
        for top_p in (0.1, 0.5, 0.9, 1.0):
            for min_p in (0.0, 0.05, 0.6, 1.0):
                out = np.asarray(filters(logits, jnp.int32(top_k or 40), jnp.float32(top_p), jnp.float32(min_p)))
                expected = [allowed(row, top_k, top_p, min_p) for row in logits.astype(np.float64)]
                assert np.array_equal(out, np.where(expected, logits, -np.inf)), (scale, top_p, min_p)


def test_filters_keep_ties_and_the_most_likely_token():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])

    filters = jax.jit(filter_logits)

    def kept(top_k, top_p, min_p):
        out = filters(logits, jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
        return np.isfinite(out)[0].tolist()

    assert kept(2, 1.0, 0.0) == [True, True, True, False]
    assert kept(4, 1e-6, 0.0) == [True, False, False, False]
    assert kept(4, 1.0, 1.0) == [True, False, False, False]
    assert kept(99, 1.0, 0.0) == [True] * 4


def penalised(logits, seen, penalty):
    logits = logits.copy()
    for token in set(seen):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def test_repetition_penalty_weighs_on_prompt_and_new_tokens_but_not_on_padding(hybrid, logits_of):
    favourite = int(logits_of(PROMPTS[1]).argmax())  # as padding: a penalty on it would show at once
    sampling = zoo.Sampling(repetition_penalty=2.0)
    out = np.asarray(zoo.generate(hybrid, PROMPTS, 8, sampling=sampling, pad_id=favourite))[:, 5:]
    assert out[1, 0] == favourite
    assert not np.array_equal(out, zoo.generate(hybrid, PROMPTS, 8)[:, 5:])
    for row, prompt in zip(out, PROMPTS, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(penalised(logits_of(tokens), tokens, 2.0).argmax()))
        assert row.tolist() == tokens[len(prompt) :]


def test_draws_follow_penalty_then_temperature_then_top_k_top_p_and_min_p(hybrid, logits_of):
    rows, prompt = 2000, PROMPTS[0]
    sampling = zoo.Sampling(temperature=2.5, top_k=10, top_p=0.6, min_p=0.5, repetition_penalty=2.5)
    out = zoo.generate(hybrid, [prompt] * rows, 1, sampling=sampling, key=jax.random.key(0))
    frequency = np.bincount(np.asarray(out)[:, 5], minlength=VOCAB) / rows

    plain = logits_of(prompt)
    logits = penalised(plain, prompt, 2.5) / 2.5
    support = allowed(logits, 10, 0.6, 0.5)
    in_other_orders = {
        "penalty last": allowed(plain / 2.5, 10, 0.6, 0.5),
        "temperature last": allowed(logits * 2.5, 10, 0.6, 0.5),
        "top-k last": allowed(logits, 0, 0.6, 0.5) & allowed(logits, 10),
        "min-p first": allowed(np.where(allowed(logits, 10, 1, 0.5), logits, -np.inf), 0, 0.6),
    }
    for name, other in in_other_orders.items():
        assert np.any(other != support), name  # else the numbers above would not tell the orders apart
    probability = np.where(support, np.exp(logits), 0)
    probability /= probability.sum()
    assert np.array_equal(frequency > 0, support)
    assert np.all(np.abs(frequency - probability) <= 4 * np.sqrt(probability / rows))


def test_rows_and_keys_draw_differently_and_the_same_key_draws_the_same(hybrid):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    first, again, other = (
        np.asarray(zoo.generate(hybrid, prompts, 8, sampling=SAMPLED, key=jax.random.key(n)))[1:] for n in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert len({tuple(row) for row in [*first, *other]}) == 4
    raw = zoo.generate(hybrid, prompts, 8, sampling=SAMPLED, key=jax.random.PRNGKey(0))
    assert np.array_equal(raw[1:], first)


def test_rows_beyond_the_vocabulary_are_never_produced():
    model = make_model(**VARIANTS["mamba"], tie_embeddings=False)
    kernel = model.lm_head.kernel[...]
    model.lm_head.kernel[...] = kernel.at[:, VOCAB:].multiply(1e4)
    prompts = np.tile(PROMPTS[0], (20, 1))
    assert np.all(np.asarray(jax.jit(model)(prompts)).argmax(axis=-1) >= VOCAB)
    for sampling in (zoo.Sampling(), zoo.Sampling(temperature=1e6, top_k=20)):
        out = np.asarray(zoo.generate(model, prompts, 8, sampling=sampling, key=jax.random.key(0)))[:, 5:]
        assert out.max() < VOCAB
    # At this temperature every token is a fair draw of its own: all are drawn, and steps as well as rows differ.
    assert set(out.ravel()) == set(range(VOCAB))
    assert min(len(set(row)) for row in out) > 2


def test_other_numbers_do_not_compile_again(hybrid):
    programs = (_prefill, _decode, _advance)
    for program in programs:  # what other tests compiled is not counted
        program.clear_cache()

    def run(model, **options):
        zoo.generate(model, PROMPTS, 8, **options)
        next(zoo.generate_stream(model, PROMPTS, 8, **options))

    run(hybrid, sampling=SAMPLED, key=jax.random.key(0), eos_id=3)
    compiled = [program._cache_size() for program in programs]
    other = make_model(**VARIANTS["hybrid"])
    other.embedding.embedding[...] = -other.embedding.embedding[...]
    sampling = zoo.Sampling(temperature=0.5, top_k=3, min_p=0.1)
    run(other, sampling=sampling, key=jax.random.split(jax.random.key(1), 3), eos_id=4, pad_id=7)
    assert [program._cache_size() for program in programs] == compiled
    run(hybrid, sampling=zoo.Sampling(temperature=1.0), key=jax.random.key(0), eos_id=3)  # no filter: another program
    assert [program._cache_size() for program in programs] == [compiled[0], compiled[1] + 1, compiled[2] + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0, expected 0 for the most likely token, or a finite number"),
        ({"top_k": -1}, "top_k=-1, expected at least 0"),
        ({"top_p": 0.0}, "top_p=0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p=1.5, expected 0 < top_p <= 1"),
        ({"min_p": -0.1}, "min_p=-0.1, expected 0 <= min_p <= 1"),
        ({"min_p": 1.1}, "min_p=1.1, expected"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0, expected 1e-06 to 1000000.0"),
    ],
)
def test_sampling_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.Sampling(**options)


DRAW = {"sampling": zoo.Sampling(temperature=1.0)}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt_ids is empty, or a row of it is"),
        ([[1], []], {}, "prompt_ids is empty, or a row of it is"),
        ([[1, 2]], {"mask": np.zeros((1, 2), bool)}, "prompt_ids is empty, or a row of it is"),
        ([1, 17], {}, "prompt_ids holds 1 to 17, expected 0 to 16, the vocabulary"),
        ([[1, 2], [-1]], {}, "prompt_ids holds -1 to 2, expected 0 to 16"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0, expected at least 1"),
        ([[1, 2]], {"mask": np.ones((1, 3), bool)}, r"mask has shape \(1, 3\), expected that of prompt_ids, \(1, 2\)"),
        ([1], {"pad_id": 24}, "pad_id holds 24 to 24, expected 0 to 16"),
        ([1], {"eos_id": [3, -1]}, "eos_id holds -1 to 3, expected 0 to 16"),
        ([1], DRAW, "key=None, expected a jax.random.key: temperature > 0"),
        (
            [[1]] * 3,
            DRAW | {"key": jax.random.split(jax.random.key(0))},
            r"key has shape \(2,\), expected .* of 3 rows",
        ),
    ],
)
@pytest.mark.parametrize("call", [zoo.generate, zoo.generate_stream])
def test_errors_name_the_argument(hybrid, call, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        call(hybrid, prompt, **options)


def test_inside_jit_a_known_prompt_is_continued_and_a_traced_one_refused(hybrid, unchecked):
    graphdef, params = nnx.split(hybrid)

    @jax.jit
    def continued(params):
        return zoo.generate(nnx.merge(graphdef, params), np.array([[3, 1, 4]]), max_new_tokens=4)

    assert continued(params).tolist() == zoo.generate(hybrid, [[3, 1, 4]], max_new_tokens=4).tolist()
    for name, call in (
        ("prompt_ids", lambda ids: zoo.generate(hybrid, ids)),
        ("mask", lambda ids: zoo.generate(hybrid, np.array([[1, 2]]), mask=ids > 0)),
    ):
        with pytest.raises(ValueError, match=f"{name} is traced by a jax transformation, expected known numbers"):
            jax.jit(call)(np.array([[1, 2]]))
