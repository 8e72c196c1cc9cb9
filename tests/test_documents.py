"""The documents run: every notebook from its first cell to its last, and the Python in the README."""

import dataclasses
import json
import re

import matplotlib.pyplot as plt
import pytest

from experiments import causal_lm
from experiments.encoders import masked_lm
from experiments.loop import seeds, train
from experiments.retrieval import retrieve
from tests.places import ROOT
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS, OURS


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")
    for table in (MIXERS, CHANNEL_MIXERS):
        for name in table.keys() - OURS:  # what they register
            del table[name]


@pytest.fixture(params=[3, pytest.param(None, marks=pytest.mark.slow)], ids=["3 steps", "all steps"])
def _training_is_short(request, monkeypatch):
    """At most so many steps a training: the code is the same, and what it plots is not."""

    def short(task, config, *args, **kw):
        few = {name: min(request.param, getattr(config, name)) for name in ("steps", "eval_every", "save_every")}
        return train.train(task, dataclasses.replace(config, **few), *args, **kw)

    if request.param is not None:
        for module in (causal_lm, masked_lm, retrieve, seeds):
            monkeypatch.setattr(module, "train", short)


@pytest.mark.usefixtures("_training_is_short")
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_a_clean_start(path):
    notebook = json.loads(path.read_text())
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        assert not cell.get("outputs"), f"cell {number} was saved with its output"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), namespace)


def test_readme_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert snippets
    namespace = {"__name__": "__main__"}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md[{number}]", "exec"), namespace)
