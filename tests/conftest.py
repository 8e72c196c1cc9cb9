"""Strictness for every test: shape annotations are checked, and NNX stays in the mode the library is written for.

Compiling is most of the time that tests take. So a program that was compiled once, by any worker or command of this
run, is not compiled again (JAX_COMPILATION_CACHE_DIR=FOLDER keeps the programs for the next run too), and the compiler
does not optimise the machine code, which spares it a third; with XLA_FLAGS= the tests run what users run.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# XLA ends the process at a flag that it does not know, as a later release may not know these.
if version("jaxlib").startswith(("0.9.", "0.10.", "0.11.", "0.12.")):
    flags = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # its older emitters take half the time; 0.12 has lost them
        flags += " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
        flags += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)

import jax
import jaxtyping
import pytest
from flax import nnx

jaxtyping.install_import_hook(["ssm", "m2", "zoo"], "beartype.beartype")
nnx.set_graph_mode(False)


def pytest_configure(config):
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and commands inherit it
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_finish():
    """Tracing makes many objects, and what was imported stays: looking through all of it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_sessionfinish():
    """Or a worker looks through all that the tests have left, five times, until it is interrupted."""
    gc.freeze()


@pytest.fixture
def x64():
    """Runs a test in float64, where agreement can be asked for to 1e-10."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Runs a test as users run the library: without the shape checker, so that the library's own errors speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
