"""The notebooks print what is kept in them, and keep nothing of the machine they ran on."""

import base64
import copy
import importlib.util
import re

import nbformat
import pytest

from tests.places import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What runs in the default suite; the others take minutes.
QUICK = ("01_monarch_and_the_fft",)

spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def read(path):
    return nbformat.read(path, as_version=4)


def every_notebook(slow=()):
    marks = {True: [pytest.mark.slow], False: []}
    return pytest.mark.parametrize(
        "path", [pytest.param(p, marks=marks[slow != () and p.stem not in slow], id=p.stem) for p in PATHS]
    )


@every_notebook(slow=QUICK)
def test_it_prints_what_is_kept(path):
    assert execute.differences(read(path), execute.run(path)) == []


@every_notebook()
def test_what_is_kept_says_nothing_of_the_machine(path):
    notebook, text = read(path), path.read_text()
    assert path.stat().st_size < 300_000
    execute.clean(copied := copy.deepcopy(notebook))  # raises where a cell warned, or printed a path
    strip = lambda n: [(c.id, c.metadata, execute.printed(c)) for c in n.cells]  # noqa: E731
    assert strip(copied) == strip(notebook)
    assert copied.metadata == notebook.metadata
    assert not re.search(r"\\u0000|iopub|execution_state|/(home|root|tmp|work|Users)/", text)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell.id for cell in code for output in cell.outputs if output.output_type == "error"]


@every_notebook()
def test_it_teaches(path):
    """A question, a paper, pictures, an exercise whose solution is folded; a picture is followed by words."""
    notebook = read(path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**" in notebook.cells[0].source
    assert "?**" in notebook.cells[0].source
    assert "arxiv.org" in notebook.cells[0].source
    assert re.search(r"## Exercise\n.*<details>\n<summary>Solution</summary>\n.*</details>", text, flags=re.DOTALL)
    assert text.count("<details>") == text.count("</details>")
    pictures = [
        o.data["image/png"] for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 2
    assert all(base64.b64decode(png)[:4] == b"\x89PNG" for png in pictures)
    for target in re.findall(r"\]\(([^)#:]+\.ipynb)\)", text):
        assert (path.parent / target).is_file(), target


def notebook_of(text, *, tags=(), picture=False):
    cell = nbformat.v4.new_code_cell("")
    cell["id"] = "one"
    cell.metadata = {"tags": list(tags)}
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    if picture:
        cell.outputs.append(nbformat.v4.new_output("display_data", data={"image/png": "", "text/plain": "<Figure>"}))
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.parametrize(
    ("kept", "now", "tags", "agree"),
    [
        ("loss 1.000, 3 layers", "loss  1.005, 3 layers", (), True),
        ("loss 1.000", "loss 1.02", (), False),
        ("loss 1.000", "loss 1.10", ("trained",), True),
        ("loss 1.000", "loss 1.20", ("trained",), False),
        ("loss 1.000", "cost 1.000", ("trained",), False),
        ("1,000 tokens", "1,200 tokens", (), False),
        ("differs by 2e-07", "differs by 9e-06", (), True),
        ("differs by 2e-07", "differs by 2e-02", (), False),
        ("13% right, 0.5", "17% right, 0.5", ("trained",), True),
        ("13% right, 0.5", "17% right, 0.5", (), False),
        ("13% right, 0.5", "19 % right, 0.5", ("trained",), False),
        ("a", "b", ("varies",), True),
        ("3 of 4", "3", (), False),
    ],
)
def test_numbers_agree_to_a_tolerance_and_words_exactly(kept, now, tags, agree):
    found = execute.differences(notebook_of(kept, tags=tags), notebook_of(now, tags=tags))
    assert (found == []) == agree


def test_a_picture_that_is_missing_is_a_difference():
    assert execute.differences(notebook_of("", picture=True), notebook_of("")) == ["one: 1 pictures kept, 0 now"]


def test_warnings_and_paths_are_refused(tmp_path):
    for output in ({"name": "stderr", "text": "Warning"}, {"name": "stdout", "text": f"{ROOT}/runs"}):
        notebook = notebook_of("")
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", **output)]
        with pytest.raises(ValueError, match="cell one"):
            execute.clean(notebook)
