"""Synthetic tasks: their answers by brute force."""

import dataclasses

import numpy as np
import pytest

from experiments.recall.tasks import MQAR, Induction, Parity, Phonebook, SelectiveCopying

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
