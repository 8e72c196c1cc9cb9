"""What is said and written of a run: exact match of each kind of question, predictions, and pictures of them."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from experiments.data.pictures import flatten
from experiments.loop.figures import save_figure
from experiments.loop.model_size import describe_size
from experiments.loop.row_files import write_rows
from experiments.loop.summary import Scores
from experiments.vision_language.presets import Config
from experiments.vision_language.rows import Rows
from experiments.vision_language.task import Guesses, Prepared, guesses, scores_of


def describe(prepared: Prepared, folder: Path) -> str:
    """What is about to happen, in two lines."""
    train, held_out = prepared.rows
    model, size = prepared.model, prepared.preprocess.size
    return (
        f"{describe_size(model, folder)}\n"
        f"{prepared.data.where}: {len(train):,} examples, {len(held_out):,} held out; images of {size} x {size} are "
        f"{model.image_tokens} tokens by {model.connector.kind}, texts up to {train.text_len}"
    )


def write_results(model: Any, folder: Path, config: Config, prepared: Prepared) -> dict[str, Scores]:
    """Scores of what is held out; predictions.jsonl and predictions.png in the folder."""
    rows, folder = prepared.rows[1], Path(folder)
    said = guesses(model, rows, config.train.batch_size)
    shown = chosen(rows, config.pictures)
    texts = answers(model, rows, shown, prepared)
    write_rows(_rows(rows, said, dict(zip(shown, texts, strict=True))), folder / "predictions.jsonl")
    plot(rows, shown, texts, said, folder)
    kinds = [rows.example(i).kind for i in range(len(rows))]
    return {"held out": scores_of(said, kinds)}


def chosen(rows: Rows, n: int) -> list[int]:
    """Some rows, of each kind of question as many: the first ones."""
    places: dict[str, list[int]] = {}
    for i in range(len(rows)):
        places.setdefault(rows.example(i).kind, []).append(i)
    in_turn = sorted((turn, place) for kind in places.values() for turn, place in enumerate(kind))
    return [place for _, place in in_turn[:n]]


def answers(model: Any, rows: Rows, shown: list[int], prepared: Prepared) -> list[str]:
    """What a model says of some rows, the likeliest token at a time."""
    tokenizer, prompts = prepared.tokenizer, [rows.prompt(i) for i in shown]
    images = np.stack([rows.image(i) for i in shown])[:, None]
    tokens = zoo.generate(model, prompts, rows.text_len, images=images, eos_id=tokenizer.eot)
    longest = max(map(len, prompts))
    return [said(tokenizer, row[longest:]) for row in np.asarray(tokens)]


def said(tokenizer: Any, tokens: np.ndarray) -> str:
    """The text of some tokens up to the end."""
    ends = np.flatnonzero(tokens == tokenizer.eot)
    kept = tokens[: ends[0]] if len(ends) else tokens
    return tokenizer.decode([t for t in map(int, kept) if t < tokenizer.vocab_size]).strip()


def _rows(rows: Rows, said: Guesses, texts: dict[int, str]) -> Iterator[dict[str, Any]]:
    """What is said of each example: whether it is right, and of those that are shown its words."""
    for i in range(len(rows)):
        example = rows.example(i)
        about = {"image": example.image, "kind": example.kind, "question": example.question, "answer": example.answer}
        words = {"said": texts[i]} if i in texts else {}
        yield about | {"right": bool(said.right[i]), "nats": float(said.nats[i])} | words


def plot(rows: Rows, shown: list[int], texts: list[str], said: Guesses, folder: Path) -> Path:
    """Draws images with what was asked and said into predictions.png, what is wrong in red."""
    from matplotlib.figure import Figure

    columns = int(np.ceil(np.sqrt(len(shown))))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, row, text in zip(panels.flat, shown, texts, strict=False):
        example = rows.example(row)
        panel.imshow(flatten(rows.data.read(example.image), "RGB", (255,)))
        title = textwrap.fill(example.question, 26) + "\n" + textwrap.fill(text, 26)
        if text != example.answer:
            title += "\n" + textwrap.fill(f"({example.answer})", 26)
        shown_text = "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in title)
        color = "tab:green" if text == example.answer else "tab:red"
        panel.set_title(shown_text, fontsize=7, color=color, parse_math=False)
    wrong = int((~said.right).sum())
    figure.suptitle(f"held out: {wrong} of {len(rows)} answers wrong; some of each kind", fontsize=9)
    path = folder / "predictions.png"
    save_figure(figure, path, dpi=120)
    return path
