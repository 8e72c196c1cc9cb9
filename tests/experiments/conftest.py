"""Commands run in this process, a cache of their own, and the corpora that several tests read."""

import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import corpus
from experiments.data.corpus import Corpus, DataConfig, load_corpus
from experiments.loop import flags
from tests.experiments.data.texts import write_documents


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    """The current folder, tmp_path, with a cache of its own in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_command(empty_folder, monkeypatch, capsys):
    """run(module, *arguments): a module's command in an empty folder, as (exit status, stdout, stderr)."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            flags.run(module.main)
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Where token arrays are kept, out of the way of other tests'."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "subquadratic-zoo"


@pytest.fixture(scope="session")
def default_corpus(tmp_path_factory) -> Corpus:
    return load_corpus(DataConfig(cache_dir=str(tmp_path_factory.mktemp("default"))))


@pytest.fixture
def text(tmp_path) -> DataConfig:
    write_documents(tmp_path / "text", 30)
    return DataConfig(path=str(tmp_path / "text"), seq_len=64)


@pytest.fixture
def builds(monkeypatch) -> list:
    """Grows by one whenever a corpus is tokenised."""
    calls: list = []
    original = corpus.tokenise

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(corpus, "tokenise", counted)
    return calls


@pytest.fixture
def squares(tmp_path):
    """A folder with 8 x 8 images whose upper or lower half is white."""
    random = np.random.default_rng(0)
    for split, n in (("train", 32), ("validation", 8), ("test", 8)):
        labels = np.arange(n) % 2
        images = random.integers(0, 60, (n, 8, 8))
        for i, label in enumerate(labels):
            images[i, 4 * label : 4 * label + 4] += 190
        (tmp_path / "squares").mkdir(exist_ok=True)
        np.savez(tmp_path / f"squares/{split}.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path / "squares"
