"""Examples in docstrings: every public function and class has one, and it prints what it says."""

import ast
import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import m2
import ssm
import zoo
from tests.places import ROOT

# What an example may use without importing it.
NAMES = {"jax": jax, "jnp": jnp, "nnx": nnx, "m2": m2, "ssm": ssm, "zoo": zoo}


def public(package):
    """Name -> object, of what a package's __init__.py exports and a docstring can belong to."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    objects = {name: getattr(importlib.import_module(package), name) for name in names}
    return {name: one for name, one in objects.items() if inspect.isfunction(one) or inspect.isclass(one)}


OBJECTS = {f"{package}.{name}": one for package in ("m2", "ssm", "zoo") for name, one in public(package).items()}
QUICK = (".scan_", ".merge_", ".segment_", "_conv", ".digit_", ".Along", ".parse_pattern", ".canonical_", ".mixer_name")


@pytest.mark.parametrize("name", OBJECTS)
def test_there_is_an_example(name):
    assert ">>> " in (inspect.getdoc(OBJECTS[name]) or "")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if any(q in n for q in QUICK) else pytest.mark.slow) for n in OBJECTS]
)
def test_an_example_prints_what_it_says(name):
    text = inspect.getdoc(OBJECTS[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(NAMES), name, None, 0)
    said = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append).failed == 0, "".join(said)
