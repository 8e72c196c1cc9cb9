"""The papers' pages: what they name is there, what they link to exists, their examples print what they say.

And the glossary has every axis letter that the code uses.
"""

import importlib.util
import re

import pytest

from tests.places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in (DOCS / "papers").glob("*.md") if path.stem != "index")
SECTIONS = ["What", "Where", "How it is checked", "What differs", "What was reproduced", "Example"]
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", flags=re.DOTALL)
SOURCES = {
    path: path.read_text() for room in ("m2", "ssm", "zoo", "experiments") for path in (ROOT / room).rglob("*.py")
}
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))

# Examples that compile nothing.
QUICK = {"mamba-2-hybrid", "nemotron-h", "modernbert-instruct", "margin-mse", "synthetic-recall"}

stem = lambda path: path.stem  # noqa: E731
pages = pytest.mark.parametrize("path", PAGES, ids=stem)
every_page = pytest.mark.parametrize("path", [*PAGES, DOCS / "papers/index.md", DOCS / "glossary.md"], ids=stem)


def slugs(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_a_page_says_what_where_how_and_what_came_of_it(path):
    text = path.read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    assert 25 <= len(text.splitlines()) <= 70
    assert re.search(r"\$\$.+\$\$", text, flags=re.DOTALL)
    ids = set(re.findall(r"arXiv:(\d{4}\.\d{5})", text))
    assert ids == set(re.findall(r"https://arxiv\.org/abs/(\d{4}\.\d{5})", text))
    first = text.split("## What")[0]
    cited = "\n".join(SOURCES.values())
    assert all(f"arXiv:{number}" in cited for number in re.findall(r"arXiv:(\d{4}\.\d{5})", first)), "the code names it"


@every_page
def test_what_a_page_names_is_there(path):
    text = path.read_text()
    for name in re.findall(r"`((?:m2|ssm|zoo|experiments|tests)/[\w/.-]*(?:\.py|\.md|/))`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in TESTS, name
    for label, target in re.findall(r"\[`([\w.]+)`\]\[([\w.]+)\]", text):
        package, _, name = target.partition(".")
        assert label == target
        assert package in ("m2", "ssm", "zoo"), target
        assert hasattr(importlib.import_module(package), name), target
    for module in re.findall(r"python -m (experiments\.[a-z_]+)", text):
        assert importlib.util.find_spec(module), module


@every_page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith("https://arxiv.org/abs/"):
            continue
        file, _, section = target.partition("#")
        # On the site RESULTS.md is a page beside these.
        place = ROOT / "RESULTS.md" if file.endswith("results.md") else (path.parent / file).resolve()
        assert place.is_file(), target
        if section:
            assert section in slugs(place.read_text()), target


def test_the_index_lists_every_page_once():
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "papers/index.md").read_text())
    assert sorted(listed) == sorted(path.name for path in PAGES)


@pytest.mark.parametrize(
    "path", [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in PAGES], ids=stem
)
def test_the_example_prints_what_it_says(path, capsys):
    [(code, said)] = EXAMPLE.findall(path.read_text())
    assert len([line for line in code.splitlines() if line]) <= 8
    exec(compile(code, path.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == said


def test_the_glossary_has_every_axis_letter():
    text = (DOCS / "glossary.md").read_text()
    explained = set(re.findall(r"^\| `(\w)` \|", text, flags=re.MULTILINE))
    used = set()
    for source in SOURCES.values():
        for axes in re.findall(r'(?:Float|Int|Bool|Shaped|Inexact|Complex|UInt8)\[[\w. |]+, "([^"]*)"\]', source):
            used |= {axis for axis in axes.split() if len(axis) == 1 and axis.isalpha()}
    assert explained == used
