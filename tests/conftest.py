"""Strictness for every test: shape annotations are checked, and NNX stays in the mode the library is written for."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jaxtyping
import pytest
from flax import nnx

jaxtyping.install_import_hook(["ssm", "m2", "zoo"], "beartype.beartype")
nnx.set_graph_mode(False)


@pytest.fixture
def x64():
    """Runs a test in float64, where agreement can be asked for to 1e-10."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Runs a test as users run the library: without the shape checker, so that the library's own errors speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
