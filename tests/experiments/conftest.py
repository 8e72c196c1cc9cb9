"""A cache of their own for the tests of data, and the corpora that several of them read."""

from pathlib import Path

import pytest

from experiments import data
from experiments.data import Corpus, DataConfig, load_corpus
from tests.experiments.texts import write_documents


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
    original = data.tokenise

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(data, "tokenise", counted)
    return calls
