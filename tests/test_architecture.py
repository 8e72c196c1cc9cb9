"""Who imports whom, and what an import costs: read from the source, and from a fresh process."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

# Package -> the packages of this repository that it may import, besides itself.
ALLOWED = {"m2": set(), "ssm": set(), "zoo": {"m2", "ssm"}, "experiments": {"m2", "ssm", "zoo"}}
HEAVY = ("safetensors", "huggingface_hub", "datasets", "grain", "orbax", "tyro", "tokenizers")
HEAVY += ("jax.experimental.pallas", "matplotlib", "tensorboardX")
# What a command imports where it is used: half a second for grain, seconds for some of the others.
HEAVY_FOR_A_COMMAND = {"datasets", "grain", "gguf", "matplotlib", "orbax", "pandas", "pyarrow", "scipy", "sklearn"}
HEAVY_FOR_A_COMMAND |= {"tensorboardX", "tensorstore", "torch", "transformers", "PIL", "bm25s", "safetensors"}
# Transformations are JAX's, on split modules: `nnx.split`, then `jax.jit`, `jax.grad`, `jax.lax.scan`.
NOT_FROM_NNX = {"jit", "grad", "value_and_grad", "Optimizer", "scan", "remat", "vmap"}

# The rooms of a package, each of which may import from those before it. "" is what stands beside them: the names of
# `zoo`, and the commands of the experiments.
ROOMS = {
    "m2": ("kernels", ""),
    "ssm": ("kernels", ""),
    "zoo": ("layers", "stack", "models", "reuse", "published", ""),
    "experiments": (
        "loop",
        "data",
        "causal",
        "encoders",
        "vision",
        "retrieval",
        "vision_language",
        "recall",
        "",
        "aot",
        "reusing",
        "bench",
    ),
}

SOURCES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


@functools.cache
def parse(path):
    return ast.parse(path.read_text())


def imported(tree):
    """Every module that a file imports, at its top or inside a function, and every name from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides where it points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_experiments_to_zoo_to_m2_and_ssm(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imported(parse(path))} & {*ALLOWED, "tests"}
    assert ours <= ALLOWED[package] | {package}


def room_of(parts):
    """The room that a module is in: ("zoo", "stack", "pattern") -> "stack"; ("zoo", "create") -> ""."""
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS[parts[0]] else ""


def rooms_above(package, parts, modules):
    """What of some modules' is imported from rooms behind that of the one with these parts.

    Kernels are the exception: an operation imports its own where it is chosen, inside a function.
    """
    order = ROOMS[package]
    inside = [module.split(".") for module in modules if module.split(".")[0] == package]
    inside = [parts for parts in inside if room_of(parts) != "kernels"]
    return [".".join(m) for m in inside if order.index(room_of(m)) > order.index(room_of(parts))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_each_room_to_those_before_it(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert rooms_above(parts[0], parts, imported(parse(path))) == []


def test_an_import_from_a_room_behind_is_found():
    assert rooms_above("zoo", ("zoo", "layers", "mlp"), ["zoo.stack.pattern.Word", "ssm", "zoo.layers.norm"]) == [
        "zoo.stack.pattern.Word"
    ]
    assert rooms_above("zoo", ("zoo", "models", "heads"), ["zoo"]) == ["zoo"]  # the package's own names are the last
    assert rooms_above("experiments", ("experiments", "bert"), ["experiments.bench.turns"]) != []
    assert rooms_above("experiments", ("experiments", "bench", "turns"), ["experiments.causal_lm.fit"]) == []


@pytest.mark.parametrize("package", ROOMS)
def test_every_folder_is_a_room_that_says_what_is_in_it(package):
    folders = {path.parent for path in SOURCES if path.relative_to(ROOT).parts[0] == package}
    rooms = {folder.name for folder in folders if folder != ROOT / package}
    assert rooms == {*ROOMS[package]} - {""}
    for folder in folders:
        assert ast.get_docstring(parse(folder / "__init__.py")), folder
        if folder.name in rooms:
            assert len(parse(folder / "__init__.py").body) == 1, f"{folder.name} has more in its __init__.py"
            assert len(ast.get_docstring(parse(folder / "__init__.py")).splitlines()) == 1


def test_tests_mirror_the_tree():
    tests = {path.relative_to(ROOT / "tests").parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert tests - {Path(), Path("situations"), Path("aot")} <= {path.relative_to(ROOT).parent for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_transformations_are_those_of_jax(path):
    tree = parse(path)
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx")
    }
    names = {module.removeprefix("flax.nnx.") for module in imported(tree)}
    assert not (attributes | names) & NOT_FROM_NNX


def test_every_package_is_read():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ALLOWED)


def test_the_fast_tests_are_there():
    for line in (ROOT / "tests" / "fast.txt").read_text().splitlines():
        file, _, name = line.partition("::")
        functions = [node.name for node in parse(ROOT / file).body if isinstance(node, ast.FunctionDef)]
        assert not name or name.partition("[")[0] in functions, line


def test_importing_the_packages_loads_nothing_heavy():
    program = "import sys, m2, ssm, zoo; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "zoo.models.causal" in modules
    assert [m for m in modules if m.startswith(tuple(f"{name}." for name in HEAVY)) or m in HEAVY] == []


def test_importing_a_command_loads_nothing_that_its_help_does_without():
    program = "import sys, experiments.causal_lm, experiments.sample; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {module.split(".")[0] for module in done.stdout.split()} & HEAVY_FOR_A_COMMAND == set()


@pytest.mark.parametrize("name", ["tensor_cut", "apart", "serialization", "forward_mode", "absent"])
def test_what_m2_and_ssm_each_have_a_copy_of_is_the_same(name):
    """Either is liftable by itself, so some files stand in both: but for docstrings and the package's own name."""

    def code(package):
        tree = ast.parse((ROOT / package / f"{name}.py").read_text().replace(f"{package}.", "package."))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)

    assert code("m2") == code("ssm")
