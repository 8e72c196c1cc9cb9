"""Strictness for every test: shape annotations are checked, and NNX stays in the mode the library is written for."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from flax import nnx
from jaxtyping import install_import_hook

install_import_hook(["ssm", "m2", "zoo"], "beartype.beartype")
nnx.set_graph_mode(False)


@pytest.fixture
def x64():
    """Runs a test in float64, where agreement can be asked for to 1e-10."""
    with jax.enable_x64(True):
        yield
