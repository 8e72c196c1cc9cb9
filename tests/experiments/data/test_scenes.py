"""Drawn scenes: the answers are those of what was drawn, and the pictures show it."""

import collections
import re

import numpy as np
import pytest

from experiments.data.scenes import COLOURS, KINDS, PLACES, SHAPES, Thing, ask, draw_scene, make_scene, questions


def expected_answer(question, things):
    """The answer, by reading the question."""
    if place := re.fullmatch(r"what is at the (.+)\?", question):
        names = [t.name for t in things if PLACES[t.place] == place[1]]
        return f"{'an' if names[0] == '8' else 'a'} {names[0]}" if names else "nothing"
    if name := re.fullmatch(r"what colour is the (\w+)\?", question):
        (thing,) = (t for t in things if t.name == name[1])
        return thing.colour
    if both := re.fullmatch(r"where is the (\w+) (\w+)\?", question):
        (thing,) = (t for t in things if (t.colour, t.name) == both.groups())
        return PLACES[thing.place]
    if colour := re.fullmatch(r"how many things are (\w+)\?", question):
        return str(sum(t.colour == colour[1] for t in things))
    if question == "which digit is there?":
        (thing,) = (t for t in things if t.name.isdigit())
        return thing.name
    if both := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return "yes" if both.groups() in {(t.colour, t.name) for t in things} else "no"
    assert question == "describe the picture."
    return ", ".join(f"{PLACES[t.place]} a {t.colour} {t.name}" for t in things) + "."


def test_answers_follow_from_what_was_drawn():
    seen = collections.Counter()
    for number in range(700):
        things = make_scene(3, number)
        asked = ask(3, number, things)
        assert asked.answer == expected_answer(asked.question, things)
        seen[asked.kind] += 1
    assert set(seen) == set(KINDS)
    assert min(seen.values()) > 30


def test_a_kind_is_asked_only_where_it_has_one_answer():
    random = np.random.default_rng(0)
    twice = (Thing(0, "circle", "red"), Thing(3, "circle", "red"))
    for kind in ("colour", "place", "digit"):
        assert questions(twice, kind, random) is None
    assert questions(twice, "count", random).answer in ("2", "0")


def test_scenes_are_functions_of_seed_and_number_and_side():
    assert make_scene(0, 5) == make_scene(0, 5)
    scenes = {make_scene(seed, n, held_out=h) for seed in (0, 1) for n in range(20) for h in (False, True)}
    assert len(scenes) > 70
    things = make_scene(0, 5)
    np.testing.assert_array_equal(draw_scene(things, 32, 5), draw_scene(things, 32, 5))


@pytest.mark.parametrize("size", [16, 32, 48])
def test_a_picture_shows_each_thing_in_its_place_and_colour(size):
    for number in range(40):
        things = make_scene(1, number)
        picture = draw_scene(things, size, number).astype(int)
        assert picture.shape == (size, size, 3)
        for place in range(4):
            row, column = divmod(place, 2)
            cell = picture[row * size // 2 : (row + 1) * size // 2, column * size // 2 : (column + 1) * size // 2]
            cell = cell.reshape(-1, 3)
            near = {name: (np.abs(cell - colour).max(axis=1) < 12).sum() for name, colour in COLOURS.items()}
            (thing,) = [t for t in things if t.place == place] or [None]
            if thing is None:
                assert max(near.values()) == 0
            elif thing.name in SHAPES:
                assert max(near, key=near.get) == thing.colour
                assert near[thing.colour] >= 8


def test_digits_to_evaluate_on_are_other_drawings():
    thing = (Thing(0, "7", "white", 3),)
    one, other = (draw_scene(thing, 32, 0, held_out=h).astype(int) for h in (False, True))
    assert np.abs(one - other).max() > 50


def test_a_picture_too_small_is_refused():
    with pytest.raises(ValueError, match="size=12, expected at least 16 pixels"):
        draw_scene(make_scene(0, 0), 12, 0)
