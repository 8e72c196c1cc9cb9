"""Synthetic tasks: their answers by brute force, batches by seed and step, long rows in chunks, and the command."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import synthetic
from experiments.loop import flags
from experiments.loop.checkpoints import restore_params
from experiments.loop.train import split_model
from experiments.synthetic import MQAR, Batches, Induction, Parity, Phonebook, SelectiveCopying
from tests.numerics import assert_close, with_random_parameters

SMALL = {
    SelectiveCopying: SelectiveCopying(length=12, n_tokens=3, vocab_size=6, max_eval_length=24),
    Induction: Induction(length=9, min_length=4, vocab_size=5, max_eval_length=128),
    MQAR: MQAR(length=20, n_pairs=5, min_pairs=1, n_queries=7, vocab_size=24),
    Phonebook: Phonebook(n_entries=5, name_length=2, number_length=3, n_letters=4, max_eval_entries=16),
    Parity: Parity(length=7, min_length=2, curriculum_steps=4, max_eval_length=64),
}
TASKS = [pytest.param(data, id=kind.__name__) for kind, data in SMALL.items()]


def rows(data, n=200, step=10):
    """(tokens, {position: answer}) of many rows, as plain Python."""
    batch = data.sample(np.random.default_rng(1), n, step)
    assert batch["tokens"].dtype == batch["targets"].dtype == batch["positions"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    for tokens, positions, targets, weights in zip(*(batch[name].tolist() for name in batch), strict=True):
        asked = [(p, t) for p, t, w in zip(positions, targets, weights, strict=True) if w]
        assert len(dict(asked)) == len(asked)
        assert all(0 <= token < data.vocab_size for token in tokens)
        yield tokens, dict(asked)


def test_selective_copying_asks_for_the_data_in_order():
    for tokens, answers in rows(SMALL[SelectiveCopying]):
        assert tokens[12:] == [5, 5, 5]
        data = [token for token in tokens[:12] if token != 0]
        assert all(1 <= token <= 4 for token in data)
        assert answers == dict(zip((12, 13, 14), data, strict=True))


def test_phonebook_asks_for_a_names_number():
    counts, places = set(), set()
    for tokens, answers in rows(SMALL[Phonebook]):
        first = tokens.index(14)  # the question mark
        assert first % 5 == 0
        entries = [tokens[i : i + 5] for i in range(0, first, 5)]
        assert all(letter < 4 for entry in entries for letter in entry[:2])
        assert all(4 <= digit < 14 for entry in entries for digit in entry[2:])
        book = {tuple(entry[:2]): entry[2:] for entry in entries}
        assert len(book) == len(entries)
        number = book[tuple(tokens[first + 1 : first + 3])]
        assert answers == dict(zip((first + 2, first + 3, first + 4), number, strict=True))
        assert tokens[first + 3 : first + 5] == number[:2]
        counts.add(len(entries))
        places.add(list(book.values()).index(number))
    assert counts == {1, 2, 3, 4, 5}
    assert places == {0, 1, 2, 3, 4}
    assert [data.n_entries for _, _, data in SMALL[Phonebook].variants()] == [2, 4, 8, 16]


def test_a_phonebook_of_several_questions_asks_for_different_names():
    numbers = set()
    for tokens, answers in rows(dataclasses.replace(SMALL[Phonebook], n_questions=3)):
        first = tokens.index(14)  # the question mark
        book = {tuple(tokens[i : i + 2]): tokens[i + 2 : i + 5] for i in range(0, first, 5)}
        starts = [position - 2 for position in sorted(answers)[::3]]
        assert starts == [first + 6 * i for i in range(min(3, len(book)))]
        names = [tuple(tokens[start + 1 : start + 3]) for start in starts]
        assert len(set(names)) == len(names)
        for start, name in zip(starts, names, strict=True):
            assert tokens[start] == 14
            assert [answers[start + i] for i in (2, 3, 4)] == book[name]
        numbers.add(len(names))
    assert numbers == {1, 2, 3}
    assert all(data.n_questions == 1 for _, _, data in dataclasses.replace(SMALL[Phonebook], n_questions=3).variants())


def test_induction_asks_for_what_followed_the_special_token():
    places, lengths = set(), set()
    for tokens, answers in rows(SMALL[Induction]):
        first, last = (i for i, token in enumerate(tokens) if token == 4)
        assert first + 1 < last
        assert answers == {last: tokens[first + 1]}
        places.add(first)
        lengths.add(last + 1)
    assert places == set(range(7))
    assert lengths == set(range(4, 10))
    fixed = dataclasses.replace(SMALL[Induction], min_length=9)
    assert {last for _, answers in rows(fixed) for last in answers} == {8}


def test_mqar_asks_for_the_value_of_each_key():
    numbers = set()
    for tokens, answers in rows(SMALL[MQAR]):
        asked = {tokens[p] for p in answers}
        pairs = {tokens[2 * i]: tokens[2 * i + 1] for i in range(len(asked))}
        assert asked == pairs.keys()
        assert all(key < 12 <= value for key, value in pairs.items())
        assert answers == {p: pairs[tokens[p]] for p in range(10, 20) if tokens[p] in pairs}
        assert len(answers) == 7
        assert not asked & set(tokens[2 * len(asked) : 10])  # nor does filler use the row's keys
        numbers.add(len(asked))
    assert numbers == {1, 2, 3, 4, 5}


def test_fewer_pairs_bring_no_more_filler():
    for _, n, variant in MQAR().variants():
        for tokens, answers in rows(variant, 20):
            assert len(answers) == len(tokens) - 2 * n == MQAR().n_queries


def test_parity_asks_for_the_ones_so_far():
    lengths = set()
    for tokens, answers in rows(SMALL[Parity]):
        assert answers == {p: sum(tokens[: p + 1]) % 2 for p in range(len(answers))}
        lengths.add(len(answers))
    assert lengths == set(range(2, 8))


def test_parity_of_whole_rows_asks_once():
    for tokens, answers in rows(dataclasses.replace(SMALL[Parity], every_position=False)):
        ((last, answer),) = answers.items()
        assert answer == sum(tokens[: last + 1]) % 2


@pytest.mark.parametrize(("step", "longest"), [(1, 3), (2, 4), (4, 7), (100, 7)])
def test_the_curriculum_lengthens_by_step(step, longest):
    assert max(len(answers) for _, answers in rows(SMALL[Parity], step=step)) == longest


@pytest.mark.parametrize("data", TASKS)
def test_variants_are_tasks_of_what_they_name(data):
    for name, value, variant in data.variants():
        assert getattr(variant, name) == value
        asked = [len(answers) for _, answers in rows(variant, 20)]
        assert len(set(asked)) == 1


def test_long_variants_double_to_the_longest():
    assert [n for _, n, _ in SMALL[Induction].variants()] == [64, 128]
    assert [n for _, n, _ in Induction().variants()] == [2**i for i in range(6, 15)]
    assert [n for _, n, _ in MQAR(n_pairs=24, length=88).variants()] == [2, 4, 8, 16, 24]


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
    one, two = (list(synthetic.held_out(data, batch_size=4, n_batches=2)) for _ in range(2))
    assert equal(one[0], two[0])
    assert not equal(one[0], one[1])
    trained = [next(Batches(data, batch_size=4, seed=seed)) for seed in (0, 1, 2)]
    assert not any(equal(batch, other) for batch in one for other in trained)


def small_model(data, pattern):
    config = zoo.CausalLMConfig(
        d_model=8, n_layers=1, pattern=pattern, vocab_size=data.vocab_size, attn=zoo.AttentionConfig(n_heads=2)
    )
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


def logits(model, batch):
    return np.asarray(jax.jit(model)(batch["tokens"]))


@pytest.mark.parametrize("pattern", ["mamba", "attn"])
def test_long_rows_in_chunks_equal_the_whole(pattern):
    data = SMALL[MQAR]
    model = small_model(data, pattern)
    batch = data.sample(np.random.default_rng(0), 3, 1)
    whole = np.take_along_axis(logits(model, batch), batch["positions"][..., None], axis=1)
    assert_close(synthetic.answer_logits(model, batch, chunk_size=8), whole)  # the last chunk is filled up


def test_the_loss_is_the_cross_entropy_of_the_answers():
    data = SMALL[Parity]
    model = small_model(data, "-/mlp")
    batch = data.sample(np.random.default_rng(0), 3, 1)
    nats = -np.asarray(jax.nn.log_softmax(logits(model, batch)))
    asked = [
        nats[row, batch["positions"][row, i], batch["targets"][row, i]]
        for row, i in zip(*np.nonzero(batch["weights"]), strict=True)
    ]
    loss = jax.jit(lambda batch: synthetic.answer_loss(model, batch, None))(batch)
    assert float(loss.weight) == len(asked) < batch["weights"].size
    assert float(loss.total) == pytest.approx(sum(asked), rel=1e-5)
    measured = synthetic.score(model, [batch], chunk_size=7)
    assert measured.loss == pytest.approx(np.mean(asked), rel=1e-5)


def test_accuracy_counts_answers_and_whole_rows(monkeypatch):
    targets = np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1]])
    guesses = np.array([[1, 2, 3], [1, 0, 3], [3, 2, 0]])
    batch = {"targets": targets, "weights": np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]])}
    monkeypatch.setattr(synthetic, "answer_logits", lambda *_, chunk_size: np.eye(4)[guesses])
    measured = synthetic.score(None, [batch, batch])
    assert measured.accuracy == pytest.approx(7 / 8)
    assert measured.sequence_accuracy == pytest.approx(2 / 3)
    assert measured.sequences == 6


@pytest.fixture
def command(run_command):
    """Runs the command in an empty folder: (exit status, stdout, stderr)."""
    return functools.partial(run_command, synthetic)


TINY = (
    *("--model.d-model", 8, "--model.n-layers", 1, "--model.pattern", "-/mlp"),
    *("--data.length", 8, "--data.min-length", 3, "--data.max-eval-length", 64, "--train.batch-size", 8),
    *("--eval-sequences", 16, "--train.no-tensorboard"),
    *("--optim.final-fraction", 1),  # so that the rate does not depend on the number of steps
)


def final_parameters(folder):
    config = synthetic.fit_vocabulary(flags.load_config(synthetic.ParityConfig, folder / "config.json"))
    _, params, _ = split_model(zoo.CausalLM(config.model, rngs=nnx.Rngs(0)))
    return jax.tree.leaves(restore_params(folder, params))


def table(folder):
    return json.loads(Path(folder, "results.json").read_text())["table"]


def test_the_command_trains_measures_and_resumes_exactly(command, tmp_path):
    status, out, err = command("parity", *TINY, "--steps", 4, "--run-dir", "whole")
    assert status == 0, err
    assert "accuracy" in out
    assert [line["length"] for line in table("whole")] == [32, 64]
    assert all(0 <= line["accuracy"] <= 1 for line in table("whole"))

    assert command("parity", *TINY, "--steps", 2, "--run-dir", "halves")[0] == 0
    longer = ("--data.max-eval-length", 128)  # what is measured may change, the run goes on
    status, out, err = command("parity", *TINY, "--steps", 4, "--run-dir", "halves", *longer)
    assert status == 0, err
    assert "resumed from step 2" in out
    assert [line["length"] for line in table("halves")] == [32, 64, 128]
    assert table("halves")[:2] == table("whole")
    for whole, halves in zip(final_parameters(tmp_path / "whole"), final_parameters(tmp_path / "halves"), strict=True):
        assert np.array_equal(whole, halves)


def test_a_config_comes_back_from_json(tmp_path):
    for _, config in synthetic.PRESETS.values():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(type(config), tmp_path / "config.json") == config


def test_the_run_folder_depends_on_what_the_run_is():
    for name, (_, config) in synthetic.PRESETS.items():
        assert str(synthetic.default_run_dir(config)) == f"runs/synthetic/{name}"
        longer = dataclasses.replace(config, eval_sequences=7)
        assert synthetic.default_run_dir(longer) == synthetic.default_run_dir(config)
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern="attn/mlp"))
        assert synthetic.default_run_dir(other).name.startswith(f"{name}-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selective-copying", "--data.n-tokens", 300], "length=64, expected at least 300"),
        (["selective-copying", "--data.vocab-size", 2], "vocab_size=2, expected at least 3"),
        (["induction", "--data.length", 8], "length=8, expected at least 16"),
        (["phonebook", "--data.n-letters", 2], "n_letters=2 and name_length=2 make 4 names, expected at least 64"),
        (["phonebook", "--data.n-questions", 17], "n_entries=16, expected at least 17"),
        (["mqar", "--data.n-pairs", 20], "length=64, expected at least 72"),
        (["mqar", "--data.min-pairs", 17], "n_pairs=16, expected at least 17"),
        (["mqar", "--data.n-queries", 15], "n_queries=15, expected at least 16"),
        (["mqar", "--data.vocab-size", 32], "vocab_size=32, expected at least 34"),
        (["parity", "--data.min-length", 0], "min_length=0, expected at least 1"),
        (["parity", "--data.curriculum-steps", -1], "curriculum_steps=-1, expected at least 0"),
        (["parity", "--eval-sequences", 0], "eval_sequences=0, expected at least 1"),
        (["parity", "--model.vocab-size", 5], "--model.vocab-size 5, expected the task's, 2"),
        (["parity", "--data.n-pairs", 5], "--data.n-pairs"),
        (["inducton"], "unknown preset 'inducton', did you mean 'induction'?"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, command, tmp_path):
    status, _, err = command(*arguments)
    assert status != 0
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selective-copying", "induction", "mqar", "phonebook", "parity"])
def test_each_preset_reaches_what_it_promises(name, command):
    promised = float(synthetic.__doc__.split(f"synthetic {name} ")[1].split(" %")[0].split()[-1])
    status, _, err = command(name, "--train.no-tensorboard", "--run-dir", "run")
    assert status == 0, err
    assert 100 * table("run")[0]["accuracy"] >= promised - 1
