"""Runs notebooks and keeps what they print and draw, or checks that they still print what is kept.

    python notebooks/execute.py               # all of them, in place
    python notebooks/execute.py 01 03         # those whose names begin so
    python notebooks/execute.py --check 01    # compares, and changes no file

A notebook starts in an empty folder, in a process of its own. What is kept says nothing of the machine or the time: no
paths, no warnings (a cell that writes to stderr is refused), small pictures. Cells carry tags where what they print
differs from machine to machine: `varies` for times and drawn samples, which are not compared, and `trained` for what a
training has led to, whose numbers agree to 15 %, and shares to 5 points of a hundred, rather than to 1 %.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: ?%)?")
# Differences of rounding are below this, and of no interest.
ROUNDING = 1e-3


def run(path: Path) -> nbformat.NotebookNode:
    """A notebook as it is after all of its cells, cleaned.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
      ValueError: a cell printed what should not be kept.
    """
    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": None, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    found = os.pathsep.join(filter(None, (str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": found, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options)
        client.execute(env=environment)
    clean(notebook)
    return notebook


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leaves nothing of the machine in a notebook that has been run, and makes its pictures small.

    Raises:
      ValueError: a warning or a path of this machine was printed.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise ValueError(f"cell {cell.id} wrote to stderr: {output.text}")
            output.get("data", {}).pop("text/html", None)
            if png := output.get("data", {}).get("image/png"):
                output.data = {"image/png": small(png), "text/plain": "<Figure>"}
                output.metadata = {}
        for path in (str(Path.home()), tempfile.gettempdir(), str(NOTEBOOKS.parent)):
            if path + "/" in printed(cell):
                raise ValueError(f"cell {cell.id} printed a path of this machine: {printed(cell)}")


def small(png: str) -> str:
    """A picture in at most 255 colours, base64: a third of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(255, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def printed(cell: nbformat.NotebookNode) -> str:
    """The text of a cell's outputs, without what stands for pictures."""
    texts = [
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in cell.get("outputs", [])
        if output.output_type != "error" and "image/png" not in output.get("data", {})
    ]
    return "\n".join(texts)


def same(kept: str, now: str, tolerance: float) -> bool:
    """Whether two texts agree: words exactly, numbers to a tolerance relative to the larger, shares to 33 times it."""
    if NUMBER.sub("#", kept).split() != NUMBER.sub("#", now).split():
        return False
    for old, new in zip(NUMBER.findall(kept), NUMBER.findall(now), strict=True):
        a, b = (float(number.rstrip(" %").replace(",", "")) for number in (old, new))
        points = 33 * tolerance if "%" in old else 0
        if abs(a - b) > max(tolerance * max(abs(a), abs(b)), points, ROUNDING):
            return False
    return True


def differences(kept: nbformat.NotebookNode, now: nbformat.NotebookNode) -> list[str]:
    """What a notebook prints otherwise than what is kept, and pictures that are missing or more, by cell."""
    found = []
    for old, new in zip(kept.cells, now.cells, strict=True):
        tags = old.metadata.get("tags", [])
        pictures = [sum("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) for cell in (old, new)]
        if pictures[0] != pictures[1]:
            found.append(f"{old.id}: {pictures[0]} pictures kept, {pictures[1]} now")
        if "varies" not in tags and not same(printed(old), printed(new), 0.15 if "trained" in tags else 0.01):
            found.append(f"{old.id}: kept\n{printed(old)}\nnow\n{printed(new)}")
    return found


def main() -> int:
    """Runs the notebooks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""], help="how the names of notebooks begin; none: all")
    parser.add_argument("--check", action="store_true", help="compare with what is kept, change no file")
    args = parser.parse_args()
    status = 0
    for path in sorted(path for name in args.names for path in NOTEBOOKS.glob(f"{name}*.ipynb")):
        now = run(path)
        if args.check:
            found = differences(nbformat.read(path, as_version=4), now)
            print(path.name, "as kept" if not found else "\n".join(["differs:", *found]), flush=True)
            status |= bool(found)
        else:
            nbformat.write(now, path)
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
