"""The documents run: the Python in the README does; links lead on. Of notebooks: `test_notebooks.py`."""

import importlib.util
import re
import textwrap

import mypy.api
import pytest

from tests.places import ROOT


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# What is said behind a snippet is what it prints. On the site's pages a snippet may be set in, as a tab.
_SNIPPET = re.compile(r"^( *)```python\n(.*?)^\1```(?:\n\n\1```text\n(.*?)^\1```)?", flags=re.DOTALL | re.MULTILINE)


def snippets(path):
    return [tuple(map(textwrap.dedent, found[1:])) for found in _SNIPPET.findall(path.read_text())]


# Those of papers are run by test_papers.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/guides").glob("*.md"))]


LONG = {"library.md"}  # a third of the time of all


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.relative_to(ROOT).as_posix(), marks=[pytest.mark.slow] * (p.name in LONG))
        for p in PAGES
        if snippets(p)
    ],
)
def test_snippets_print_what_the_page_says(path, capsys):
    namespace = {"__name__": "__main__"}
    for number, (snippet, output) in enumerate(snippets(path)):
        exec(compile(snippet, f"{path.name}[{number}]", "exec"), namespace)
        assert capsys.readouterr().out == output


@pytest.mark.slow
def test_readme_snippets_pass_the_type_checker(tmp_path):
    path = tmp_path / "readme.py"
    path.write_text("\n".join(snippet for snippet, _ in snippets(ROOT / "README.md")))
    said, errors, status = mypy.api.run(["--config-file", str(ROOT / "pyproject.toml"), str(path)])
    assert status == 0, said + errors


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_links_between_documents_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()):
        file, _, section = target.partition("#")
        path = ROOT / (file or name)
        assert path.is_file(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_readme_is_one_that_one_reads():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_commands_of_the_documents_exist():
    text = "".join(path.read_text() for path in (*PAGES, ROOT / "RESULTS.md"))
    for module in set(re.findall(r"python -m (experiments\.[a-z_]+)", text)):
        assert importlib.util.find_spec(module), module


def test_documents_say_one_thing():
    """Not two, with the marks of a merge between them."""
    written = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [path.name for path in written if re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(), re.MULTILINE)] == []
