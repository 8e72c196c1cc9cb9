"""What `mkdocs build` does besides: pages out of files that stand elsewhere, mathematics as MathML, lists of pages.

RESULTS.md, CHANGELOG.md, CONTRIBUTING.md and CITATION.cff are written once, in the root of the repository, the help of
every command in its module, and notebooks with what they print and draw: pages of the site are made of them here.
"""

import ast
import html
import itertools
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import latex2mathml.converter
import nbconvert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Page of the site <- file of the repository.
COPIED = {"results.md": "RESULTS.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
PACKAGES = {
    "ssm": "Selective state spaces, linear attention, short convolutions: operations and the mixers built on them.",
    "m2": "Monarch matrices, long convolutions, the Monarch Mixer.",
    "zoo": "Layers beside state spaces and Monarch Mixer, stacks by patterns, whole models, published weights.",
}
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
_PICTURES = ("*/*.png", "*/*/*.png")
_NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def on_config(config: Any) -> Any:
    """Lists the pages of papers and of notebooks in the navigation, each after the page about all of them."""
    papers = [path.stem for path in sorted((ROOT / "docs/papers").glob("*.md")) if path.stem != "index"]
    pages = {"papers/": papers, "notebooks/": [path.stem for path in _NOTEBOOKS]}
    for entry in config.nav:
        for title, folder in entry.items() if isinstance(entry, dict) else ():
            if isinstance(folder, str) and folder in pages:
                entry[title] = [f"{folder}{page}.md" for page in ("index", *pages[folder])]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages that are made, and the pictures in them."""
    for page, source in COPIED.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text())))
    files.append(File.generated(config, "citation.md", content=_citation()))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    for package, about in PACKAGES.items():
        files.append(File.generated(config, f"reference/{package}.md", content=_reference(package, about)))
    for name, content in _notebooks().items():
        files.append(File.generated(config, f"notebooks/{name}", content=content))
    for picture in sorted({path for pattern in _PICTURES for path in (ROOT / "experiments").glob(pattern)}):
        name = f"pictures/{picture.name}"
        files.append(File.generated(config, name, content=picture.read_bytes()))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Writes mathematics as MathML, which browsers draw by themselves."""

    def element(found: re.Match[str]) -> str:
        block = found["tag"] == "div"
        text = html.unescape(found["text"]).strip().removeprefix("\\[" if block else "\\(")
        text = text.removesuffix("\\]" if block else "\\)")
        return latex2mathml.converter.convert(text, display="block" if block else "inline")

    return re.sub(r'<(?P<tag>span|div) class="arithmatex">(?P<text>.*?)</(?P=tag)>', element, content, flags=re.DOTALL)


def _moved(text: str) -> str:
    """A document of the repository's root as a page: links lead to where things stand on the site, or are names."""

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        file, _, section = target.partition("#")
        if not file or "://" in file:
            return found[0]
        pages = {source: page for page, source in COPIED.items()} | {"README.md": "index.md"}
        if file in pages:
            return f"{label}({pages[file]}{'#' if section else ''}{section})"
        if file.endswith(".png"):
            return f"{label}(pictures/{posixpath.basename(file)})"
        return f"`{file}`"  # a file of the repository, which the site does not hold

    return _LINK.sub(link, text)


def _notebooks() -> dict[str, str | bytes]:
    """A page of every notebook as it is kept, its pictures, and a page that lists their questions."""
    files: dict[str, str | bytes] = {}
    questions = []
    for path in _NOTEBOOKS:
        text, resources = nbconvert.MarkdownExporter().from_filename(str(path), {"output_files_dir": path.stem})
        title, question = re.findall(r"^# (.*)|^\*\*(.*?\?)\*\*", text, flags=re.MULTILINE)[:2]
        questions.append(f"| [{title[0]}]({path.stem}.md) | {question[1]} |")
        text = re.sub(r"\]\(([^)#:]+)\.ipynb\)", r"](\1.md)", text).replace("<details>", '<details markdown="1">')
        files[f"{path.stem}.md"] = text
        files |= resources["outputs"]
    about = (
        "Derivation, code, picture, exercise with solution: the files of `notebooks/` with what they print and draw on "
        "a CPU. `make notebooks` opens them; without a GPU each takes a minute or a few."
    )
    files["index.md"] = f"# Notebooks\n\n{about}\n\n| notebook | question |\n| --- | --- |\n" + "\n".join(questions)
    return files


def _citation() -> str:
    cff = (ROOT / "CITATION.cff").read_text()
    return f"# Citation\n\n`CITATION.cff` says it for machines:\n\n```yaml\n{cff}```\n"


def public_names(package: str) -> dict[str, list[str]]:
    """Module -> the names that `package` exports from it, in the order of its __init__.py."""
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / package / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.setdefault(node.module, []).extend(alias.asname or alias.name for alias in node.names)
    return names


def _reference(package: str, about: str) -> str:
    """A page with every public name of a package, by the file that it stands in."""
    parts = [f"# {package}", about]
    for module, names in public_names(package).items():
        text = ast.get_docstring(ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())) or ""
        parts += [f"## {module}", text.split("\n\n")[0], *(_entry(package, module, name) for name in names)]
    return "\n\n".join(parts) + "\n"


def _entry(package: str, module: str, name: str) -> str:
    """What mkdocstrings makes a public name's entry of, which is found as PACKAGE.NAME."""
    if not (ROOT / package / f"{name}.py").exists() and not (ROOT / package / name).is_dir():
        return f"::: {package}.{name}"
    # A file is called so, too, and would be taken for it.
    return f"[](){{#{package}.{name}}}\n\n::: {module}.{name}\n    options:\n      heading: {package}.{name}"


def _commands() -> str:
    """The help of every command, out of its module."""
    parts = [
        "# Commands",
        "Where the package is installed, `subq NAME` is `python -m experiments.NAME`. Each prints its presets and all "
        "its flags with `--help`; what follows is the head of that page.",
    ]
    [table] = [
        node.value
        for node in ast.parse((ROOT / "experiments/subq.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"
    ]
    for name, module in ast.literal_eval(table).items():
        path = ROOT / (module.replace(".", "/") + ".py")
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        parts += [f"## {name}", _as_markdown(text)]
    return "\n\n".join(parts) + "\n"


def _as_markdown(text: str) -> str:
    """A docstring as Markdown: commands, and what is set in, are code."""

    def is_code(line: str) -> bool:
        return line.startswith(("    ", "python -m ", "subq "))

    blocks = []
    for code, lines in itertools.groupby(text.splitlines(), lambda line: is_code(line) if line.strip() else None):
        if code is not None:
            block = "\n".join(lines)
            blocks.append(f"```bash\n{textwrap.dedent(block)}\n```" if code else block)
    return "\n\n".join(blocks)
