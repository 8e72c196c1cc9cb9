"""Who imports whom, and what an import costs: read from the source, and from a fresh process."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Package -> the packages of this repository that it may import, besides itself.
ALLOWED = {"m2": set(), "ssm": set(), "zoo": {"m2", "ssm"}, "experiments": {"m2", "ssm", "zoo"}}
HEAVY = ("safetensors", "huggingface_hub", "datasets", "grain", "orbax", "tyro", "tokenizers")
HEAVY += ("jax.experimental.pallas", "matplotlib", "tensorboardX")
# Transformations are JAX's, on split modules: `nnx.split`, then `jax.jit`, `jax.grad`, `jax.lax.scan`.
NOT_FROM_NNX = {"jit", "grad", "value_and_grad", "Optimizer", "scan", "remat", "vmap"}

SOURCES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported(tree):
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides where it points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_experiments_to_zoo_to_m2_and_ssm(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))} & {*ALLOWED, "tests"}
    assert ours <= ALLOWED[package] | {package}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_transformations_are_those_of_jax(path):
    tree = ast.parse(path.read_text())
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx")
    }
    names = {module.removeprefix("flax.nnx.") for module in imported(tree)}
    assert not (attributes | names) & NOT_FROM_NNX


def test_every_package_is_read():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ALLOWED)


def test_importing_the_packages_loads_nothing_heavy():
    program = "import sys, m2, ssm, zoo; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "zoo.models" in modules
    assert [m for m in modules if m.startswith(tuple(f"{name}." for name in HEAVY)) or m in HEAVY] == []
