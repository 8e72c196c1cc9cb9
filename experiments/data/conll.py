"""Sentences as CoNLL's tasks have them: a word a line, its tags in columns beside it, an empty line between sentences.

    EU  NNP B-NP B-ORG        columns between spaces or tabs; the word is the first, the tag the last: .conll, .iob
    2   dog dog NOUN NN ...   ten columns with names: .conllu

Source: Tjong Kim Sang & De Meulder 2003, aclanthology.org/W03-0419; universaldependencies.org/format.html.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".conllu")
# What stands in files of sentences whose name does not say so.
PLAIN = ".txt"
NAMES = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")

Row = dict[str, Any]


def read_sentences(file: Iterable[str], name: str, bad: Callable[[str], None], *, named: bool) -> Iterator[Row]:
    """A row for each sentence: "words" and "tags", and each other column as a list, by its number or its name.

    Args:
      bad: told what is wrong with a sentence, which is left out then.
      named: whether columns are CoNLL-U's, of which words are "form" and tags are "upos".
    """
    lines: list[list[str]] = []
    first = 0
    for number, line in enumerate([*file, ""], start=1):
        cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not line.strip():
            if lines:
                yield from _sentence(lines, first, name, bad, named)
            lines = []
        elif cells[0] == "-DOCSTART-" or (named and (line.startswith("#") or not cells[0].isdigit())):
            continue  # between texts; a comment, a word that is two, or one that is not there
        else:
            first = first if lines else number
            lines.append(cells)


def _sentence(lines: list[list[str]], first: int, name: str, bad: Callable[[str], None], named: bool) -> Iterator[Row]:
    widths = {len(cells) for cells in lines}
    if len(widths) > 1 or min(widths) < 2:
        found = " and ".join(map(str, sorted(widths)))
        bad(
            f"the sentence from line {first} on of {name} has lines of {found} columns, expected a word and as many "
            "tags on each"
        )
        return
    columns = [list(column) for column in zip(*lines, strict=True)]
    if named:
        row = dict(zip(NAMES, columns, strict=False))
        yield {"words": columns[1], "tags": columns[min(3, len(columns) - 1)]} | row
    else:
        numbered = {str(number): column for number, column in enumerate(columns, start=1)}
        yield {"words": columns[0], "tags": columns[-1]} | numbered
