"""Compiled programs are kept for the next command: where, and when not."""

import os
import subprocess
import sys

import jax
import pytest

from experiments.loop import compiled
from tests.places import ROOT

# A command that compiles one program, and says how often it was taken from the cache.
COMMAND = """
import jax, jax.numpy as jnp
from experiments.loop import flags

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)

def main():
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
    print("hits", len(hits), jax.config.jax_compilation_cache_dir)

flags.run(main)
"""


def run(folder, **environment):
    told = ("JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL", "JAX_ENABLE_COMPILATION_CACHE")
    inherited = {name: value for name, value in os.environ.items() if name not in told}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        cwd=ROOT,
        env=inherited | {"XDG_CACHE_HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    _, hits, where = done.stdout.split()
    return int(hits), where, done.stderr


@pytest.mark.slow
def test_a_second_command_compiles_nothing_and_logs_nothing(tmp_path):
    hits, where, _ = run(tmp_path)
    assert hits == 0
    assert where == str(tmp_path / "subquadratic-zoo" / "compiled" / compiled.processor_key())
    hits, _, err = run(tmp_path)
    assert hits > 0
    assert err == ""


def test_what_jax_was_told_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = jax.config.jax_compilation_cache_dir  # the test suite's
    assert told
    assert compiled.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == told
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def untold(monkeypatch):
    """JAX as it is where nobody has said anything about a cache."""
    options = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache")
    before = {option: getattr(jax.config, option) for option in options}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(compiled, "_silence_loader", lambda: None)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for option, value in before.items():
        jax.config.update(option, value)


def test_switched_off_it_makes_no_folder(tmp_path, monkeypatch, untold):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    assert compiled.keep_compiled() is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_to_write_to_nothing_is_kept(tmp_path, monkeypatch, untold):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_another_number_of_cores_is_another_folder(monkeypatch):
    here = compiled.processor_key()
    assert here == compiled.processor_key()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)), raising=False)
    assert compiled.processor_key() != here
