"""What each kind of label asks of a model: losses that padding leaves alone, predictions that come back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import zoo
from experiments.data.labelled import Examples
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer, train_bpe, train_wordpiece
from experiments.encoders.objectives import Target, first_tokens, load_target, make_objective, save_target
from experiments.encoders.prediction import run_over
from experiments.encoders.shapes import small_encoder
from tests.numerics import assert_close, with_random_parameters
from zoo.models.build import build

BYTES = ByteTokenizer()
ANSWER = {"text": ["is"], "answer_start": [5]}
CASES = {
    "classes": (Target("classification", classes=("a", "b", "c"), max_len=64), ["x", "yes"], None, ["b", "c"]),
    "pairs": (Target("classification", classes=("a", "b"), max_len=64), ["x", "yes"], ["no", "z"], ["b", "a"]),
    "words": (
        Target("classification", "mlm", ("a", "b"), max_len=64, template="{text} [MASK]", word_ids=(65, 66)),
        ["x", "yes"],
        None,
        ["b", "a"],
    ),
    "several": (Target("multi-label", classes=("a", "b"), max_len=64), ["x", "yes"], None, [["a", "b"], []]),
    "numbers": (Target("regression", mean=2.0, std=3.0, max_len=64), ["x", "yes"], None, [1.5, -2.0]),
    "tags": (Target("tagging", classes=("N", "V"), max_len=64), [["x", "is"], ["no"]], None, [["N", "V"], ["V"]]),
    "spans": (Target("span-qa", max_len=64), ["what?", "is?"], ["This is it.", "That is"], [ANSWER, ANSWER]),
}


def make(case, pattern="attn/mlp", **fields):
    """An objective, its examples, and a small model with random parameters for it."""
    target, texts, seconds, labels = CASES[case]
    vocab_size = special_tokens(BYTES).vocab_size
    encoder = dataclasses.replace(
        small_encoder(16, 1, 64), pattern=pattern, vocab_size=vocab_size, attn=zoo.AttentionConfig(head_dim=8), **fields
    )
    objective = make_objective(target, BYTES, pad_to_max=not encoder.mask_padding)
    config = objective.config(encoder, pool="mean", dropout=0.0)
    model = with_random_parameters(lambda: build(config, rngs=nnx.Rngs(0)))
    return objective, Examples(texts, seconds, labels), model


@pytest.mark.parametrize(
    "case", [case if case == "tags" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_empty_rows_and_padding_count_nothing(case, x64):
    objective, examples, model = make(case, dtype="float64", param_dtype="float64")
    rows = objective.rows(examples)
    graphdef, params = nnx.split(model, nnx.Param, ...)[0], nnx.state(model, nnx.Param)

    def mean(params, batch):
        loss, logits = objective.outputs(nnx.merge(graphdef, params), batch, None)
        return loss.total / loss.weight, logits

    value_and_gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))

    def run(batch):
        (loss, logits), gradients = value_and_gradients(params, jax.tree.map(jnp.asarray, batch))
        # As one vector: the bias of the logits of a span has no gradient, but for rounding.
        return loss, logits, ravel_pytree(gradients)[0]

    batch = rows(np.array([0, 1]))
    loss, logits, gradients = run(batch)
    empty_loss, empty_logits, empty_gradients = run(rows(np.array([0, -1, 1, -1])))
    assert_close(empty_loss, loss)
    assert_close(empty_logits[::2], logits)
    assert_close(empty_gradients, gradients)
    # Another bucket: every array that has a value for each token is longer.
    length = batch["tokens"].shape[1]
    longer = {name: np.pad(x, [(0, 0), (0, 32)]) if x.shape[1:] == (length,) else x for name, x in batch.items()}
    longer_loss, longer_logits, longer_gradients = run(longer)
    assert_close(longer_loss, loss)
    assert_close(longer_logits[:, :length] if case in ("tags", "spans") else longer_logits, logits)
    assert_close(longer_gradients, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pairs", "words", "tags"])
def test_a_mixture_of_experts_is_trained_with_its_balance(case):
    objective, examples, model = make(case, pattern="attn/moe[n_experts=3,d_ff=8,balance_weight=0.5]")
    batch = jax.tree.map(jnp.asarray, objective.rows(examples)(np.arange(2)))
    loss = objective.loss(model, batch, None)
    types = batch["token_types"] if model.config.type_vocab_size > 1 else None
    assert loss.auxiliary == model.run(batch["tokens"], batch["mask"], token_type_ids=types)[1] > 0.4
    plain, _, model = make(case)
    assert plain.loss(model, batch, None).auxiliary is None


@pytest.mark.parametrize("case", CASES)
def test_logits_that_are_certain_give_the_labels_back(case):
    objective, examples, _ = make(case)
    rows = objective.rows(examples)
    batch = rows(np.arange(len(rows)))
    if case == "numbers":
        logits = batch["labels"][:, None]
    elif case == "several":
        logits = 20 * batch["labels"] - 10
    elif case == "spans":
        logits = np.swapaxes(10 * np.eye(batch["tokens"].shape[1])[batch["labels"]], 1, 2)
    else:
        logits = 10 * np.eye(len(objective.target.classes))[batch["labels"]]
    predicted = objective.predictions(examples, list(logits)).labels
    if case == "numbers":
        assert predicted == pytest.approx(examples.labels)
    elif case == "spans":
        assert predicted == [answer["text"][0] for answer in examples.labels]
    else:
        assert predicted == examples.labels
    best = objective.scores(predicted, examples.labels)
    assert best.get("accuracy", best.get("pearson", best.get("exact_match"))) == pytest.approx(1)
    assert float(jnp.mean(objective.nats(jnp.asarray(logits), jnp.asarray(batch["labels"])))) < 0.1


def test_a_verbaliser_s_probabilities_are_the_softmax_of_its_words_logits():
    objective, examples, model = make("words")
    rows = objective.rows(examples)
    batch = rows(np.array([0, 1]))
    mask = special_tokens(BYTES).mask
    assert [row.tolist().index(mask) for row in batch["tokens"]] == batch["positions"].tolist()
    whole = model(jnp.asarray(batch["tokens"]), jnp.asarray(batch["mask"]))
    at_mask = whole[jnp.arange(2), batch["positions"]][:, jnp.array([65, 66])]
    _, logits = run_over(model, objective, rows, 2)
    said = objective.predictions(examples, logits)
    assert_close(jnp.asarray(said.scores), jax.nn.softmax(at_mask))
    assert said.labels == [("a", "b")[i] for i in np.argmax(at_mask, axis=1)]


def test_the_gradient_reaches_the_encoder_at_the_mask_alone():
    objective, examples, model = make("words")
    batch = objective.rows(examples)(np.array([0, 1]))
    hidden = jax.random.normal(jax.random.key(0), (2, batch["tokens"].shape[1], 16))

    def loss(hidden):
        logits = objective.word_logits(model, hidden, batch["positions"])
        return jnp.sum(objective.nats(logits, jnp.asarray(batch["labels"])))

    reached = jnp.any(jax.grad(loss)(hidden) != 0, axis=-1)
    assert reached.tolist() == (np.arange(reached.shape[1]) == batch["positions"][:, None]).tolist()


def test_rows_come_back_in_their_order_whatever_their_bucket():
    objective, _, model = make("classes")
    texts = ["x" * n for n in (50, 3, 40, 5, 60, 2)]
    rows = objective.rows(Examples(texts, None, None))
    assert len(set(rows.texts.bucket)) == 2
    loss, logits = run_over(model, objective, rows, 4)
    assert np.isnan(loss)
    for text, expected in zip(texts, logits, strict=True):
        alone = objective.rows(Examples([text], None, None))
        assert_close(run_over(model, objective, alone, 1)[1][0], expected)


def test_models_that_take_padding_for_text_always_get_as_much():
    objective, examples, _ = make("classes", mask_padding=False)
    assert objective.rows(examples)(np.array([0]))["tokens"].shape == (1, 64)


def test_token_types_go_to_models_that_know_them():
    objective, examples, model = make("pairs", type_vocab_size=2)
    batch = jax.tree.map(jnp.asarray, objective.rows(examples)(np.array([0, 1])))
    assert batch["token_types"].max() == 1
    _, typed = objective.outputs(model, batch, None)
    _, untyped = objective.outputs(model, {**batch, "token_types": 0 * batch["token_types"]}, None)
    assert not np.allclose(typed, untyped)


@pytest.mark.parametrize("name", ["bytes", "wordpiece", "bpe"])
def test_every_word_has_the_token_it_begins_with(name):
    words = ["Zürich", "isn't", "far-off", ",", "x", "Ann"]
    text = " ".join(words)
    tokenizer = {"bytes": BYTES, "wordpiece": train_wordpiece([text] * 3, 300), "bpe": train_bpe([text] * 3, 300)}[name]
    _, offsets = tokenizer.encode_with_offsets(text)
    begins = [text.index(f"{word} " if word != "Ann" else word) for word in words]
    for token, begin, word in zip(first_tokens(words, offsets), begins, words, strict=True):
        start, end = offsets[token]
        assert start in (begin - 1, begin)
        assert begin < end <= begin + len(word)


def test_words_without_tokens_and_behind_the_end_are_guessed_to_be_outside():
    target = Target("tagging", classes=("B-X", "O"), max_len=6)
    tokenizer = train_wordpiece(["one two three four five"] * 3, 300)
    objective = make_objective(target, tokenizer)
    examples = Examples([["one", "\u200b", "two", "three", "four", "five"]], None, [["B-X"] * 6])
    batch = objective.rows(examples)(np.array([0]))
    assert batch["weights"].sum() < 6
    certain = np.zeros((1, batch["tokens"].shape[1], 2))
    certain[..., 0] = 10
    said = objective.predictions(examples, list(certain)).labels[0]
    assert (said[0], said[1], said[-1]) == ("B-X", "O", "O")


def test_a_target_comes_back_from_its_file(tmp_path):
    for target, *_ in CASES.values():
        save_target(target, tmp_path)
        assert load_target(tmp_path) == target
    with pytest.raises(FileNotFoundError, match="holds no tuned model"):
        load_target(tmp_path / "elsewhere")
