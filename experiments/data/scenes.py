"""Drawn scenes: pictures whose captions and answers are exact, made from a seed, without a download.

A scene has a few places in rows and columns, and some of them hold a thing: a shape in a colour, or a handwritten digit
in a colour (scikit-learn's, those for evaluation by other people). What is asked follows from what was drawn.

    shape      what is at the top left?                 a circle
    colour     what colour is the circle?               red
    place      where is the red circle?                 top left
    count      how many things are red?                 2
    digit      which digit is there?                    7
    there      is there a blue square?                  yes
    caption    describe the picture.                    top left a red circle, bottom right a blue 7.

Each kind of question is asked only where it has one answer.
"""

import functools
from typing import Literal, NamedTuple, get_args

import numpy as np

QuestionKind = Literal["shape", "colour", "place", "count", "digit", "there", "caption"]
KINDS: tuple[str, ...] = get_args(QuestionKind)
COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (230, 200, 40),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)


class Thing(NamedTuple):
    """What stands at a place."""

    place: int
    """Its number in `PLACES`."""
    name: str
    """One of `SHAPES`, or a digit."""
    colour: str
    drawing: int = 0
    """Which of the drawings of a digit."""

    @property
    def is_digit(self) -> bool:
        """Whether it is one."""
        return self.name.isdigit()


class Asked(NamedTuple):
    """A question about a picture, and its answer."""

    kind: str
    question: str
    answer: str


def make_scene(seed: int, number: int, *, held_out: bool = False) -> tuple[Thing, ...]:
    """The things of scene number `number`, in the order of their places.

    Args:
      seed: of the set of scenes.
      number: from 0.
      held_out: whether it is for evaluation: another stream of scenes, with digits by other people.
    """
    random = np.random.default_rng((seed % (1 << 64), int(held_out), number))
    places = np.sort(random.choice(len(PLACES), random.integers(1, len(PLACES) + 1), replace=False))
    things = []
    for place in places:
        digit = random.random() < 0.3
        name = str(random.integers(10)) if digit else SHAPES[random.integers(len(SHAPES))]
        colour = tuple(COLOURS)[random.integers(len(COLOURS))]
        things.append(Thing(int(place), name, colour, int(random.integers(1 << 30)) if digit else 0))
    return tuple(things)


def draw_scene(things: tuple[Thing, ...], size: int, seed: int, *, held_out: bool = False) -> np.ndarray:
    """A picture (size, size, 3) of 8 bits: things a little off the middle of their places, of several sizes.

    Args:
      things: what is drawn.
      size: pixels to a side, at least 16.
      seed: of where exactly, how large, and of the noise of the ground.
      held_out: whose digits.

    Raises:
      ValueError: a picture too small to tell things apart.
    """
    if size < 16:
        raise ValueError(f"size={size}, expected at least 16 pixels to a side")
    random = np.random.default_rng((seed % (1 << 64), 3))
    picture = random.normal(40, 6, (size, size, 3))
    cell = size // 2
    for thing in things:
        row, column = divmod(thing.place, 2)
        half = cell * (0.32 + 0.1 * random.random())
        middle = (np.array([row, column]) + 0.5) * cell + random.uniform(-0.08, 0.08, 2) * cell
        y, x = (np.indices((size, size)) + 0.5 - middle[:, None, None]) / half  # -1 to 1 inside
        ink = _digit(thing, y, x, held_out) if thing.is_digit else _shape(thing.name, y, x)
        picture += ink[..., None] * (np.array(COLOURS[thing.colour]) - picture)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _shape(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where there is ink, 0 or 1."""
    inside = {
        "circle": y**2 + x**2 <= 1,
        "square": np.maximum(np.abs(y), np.abs(x)) <= 0.85,
        "triangle": (np.abs(x) <= (y + 1) / 2) & (y <= 0.9),
        "cross": (np.minimum(np.abs(y), np.abs(x)) <= 0.28) & (np.maximum(np.abs(y), np.abs(x)) <= 1),
    }
    return inside[name].astype(float)


def _digit(thing: Thing, y: np.ndarray, x: np.ndarray, held_out: bool) -> np.ndarray:
    """The ink of a handwritten digit of 8 x 8 pixels, stretched over its place."""
    drawings = _drawings()[held_out][int(thing.name)]
    ink = drawings[thing.drawing % len(drawings)]
    rows, columns = (np.clip(((z + 1) * 4).astype(int), 0, 7) for z in (y, x))
    return ink[rows, columns] * (np.maximum(np.abs(y), np.abs(x)) <= 1)


@functools.cache
def _drawings() -> dict[bool, dict[int, np.ndarray]]:
    """scikit-learn's digits by what they are, 0 to 1: the last fifth is by other people and for evaluation."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    cut = len(bunch.target) * 4 // 5
    parts = {False: slice(0, cut), True: slice(cut, None)}
    return {
        held_out: {d: bunch.images[part][bunch.target[part] == d] / 16 for d in range(10)}
        for held_out, part in parts.items()
    }


def questions(things: tuple[Thing, ...], kind: str, random: np.random.Generator) -> Asked | None:
    """A question of a kind about a scene, or None where none of it has one answer.

    Args:
      things: the scene.
      kind: one of `KINDS`.
      random: what chooses among those that there are.
    """
    if kind == "caption":
        said = [f"{PLACES[t.place]} {_named(t)}" for t in things]
        return Asked(kind, "describe the picture.", ", ".join(said) + ".")
    found: list[tuple[str, str]] = []
    names, colours = [t.name for t in things], [t.colour for t in things]
    digits, whole = [t.name for t in things if t.is_digit], [(t.colour, t.name) for t in things]
    if kind == "shape":
        there = {t.place: _article(t.name) for t in things}
        found = [(f"what is at the {PLACES[p]}?", there.get(p, "nothing")) for p in range(len(PLACES))]
    elif kind == "colour":
        found = [(f"what colour is the {t.name}?", t.colour) for t in things if names.count(t.name) == 1]
    elif kind == "place":
        only = [t for t in things if whole.count((t.colour, t.name)) == 1]
        found = [(f"where is the {t.colour} {t.name}?", PLACES[t.place]) for t in only]
    elif kind == "count":
        colour = tuple(COLOURS)[random.integers(len(COLOURS))] if random.random() < 0.3 else colours[0]
        found = [(f"how many things are {colour}?", str(colours.count(colour)))]
    elif kind == "digit":
        found = [("which digit is there?", digits[0])] if len(digits) == 1 else []
    elif kind == "there":
        if random.random() < 0.5:
            found = [(f"is there {_named(t)}?", "yes") for t in things]
        else:
            name = str(random.integers(10)) if random.random() < 0.3 else SHAPES[random.integers(len(SHAPES))]
            asked = tuple(COLOURS)[random.integers(len(COLOURS))], name
            found = [(f"is there a {asked[0]} {asked[1]}?", "yes" if asked in whole else "no")]
    return Asked(kind, *found[random.integers(len(found))]) if found else None


def ask(
    seed: int, number: int, things: tuple[Thing, ...], *, held_out: bool = False, kinds: tuple[str, ...] = KINDS
) -> Asked:
    """The question of example number `number`: of each kind in turn, the next kind where one cannot be asked.

    Args:
      seed, number, held_out: as in `make_scene`.
      things: the scene of that number.
      kinds: what may be asked; a caption always can be, and is where nothing else can.
    """
    random = np.random.default_rng((seed % (1 << 64), int(held_out), number, 2))
    order = [*(kinds[(number + i) % len(kinds)] for i in range(len(kinds))), "caption"]
    return next(asked for kind in order if (asked := questions(things, kind, random)) is not None)


def _named(thing: Thing) -> str:
    return f"a {thing.colour} {thing.name}"


def _article(name: str) -> str:
    return f"an {name}" if name == "8" else f"a {name}"
