"""A run as a page: index.html in its folder, whole in itself, which any browser opens from disk.

result       what the command printed at its end: scores, a sample, mistakes
curves       every metric that the run has, held out and trained
pictures     what else was drawn into the folder
starts       by which commands, on which devices, with which versions
configuration
"""

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.loop import comparison
from experiments.loop.distributed import by_first
from experiments.loop.history import Run, read_run
from experiments.loop.json_files import write_text
from experiments.loop.starts import read_starts

PAGE_FILE, RESULT_FILE = "index.html", "result.txt"
# Larger ones would make the page slow to open; it names them.
_LARGEST_PICTURE = 4 << 20


def show_end(folder: Path, lines: Sequence[str], files: str) -> None:
    """Ends a run that has come to its last step: prints its result, keeps it, and writes the page.

    Args:
      folder: the run's.
      lines: its result, as it is printed.
      files: what the folder holds, for the closing line.
    """
    for line in lines:
        print(line)
    keep_result(folder, lines)
    print(f"run folder: {folder} ({PAGE_FILE}, {files})")


@by_first
def keep_result(folder: Path, lines: Sequence[str]) -> None:
    """Writes what a run has come to into its folder, and its page once more."""
    try:
        (folder / RESULT_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_page(folder)
    except OSError as error:
        print(f"{folder}/{PAGE_FILE} could not be written: {error.strerror}", flush=True)


def write_page(folder: Path) -> Path:
    """Writes a run's page in one step, and gives its path."""
    path = folder / PAGE_FILE
    write_text(page(read_run(folder)), path)
    return path


def page(run: Run, **more: Any) -> str:
    """A run's page as HTML.

    Args:
      more: what else the template is told: `back`, a link to a list of runs; `refresh`, seconds until it is read again.
    """
    folders = [run.folder, *(run.folder / f"seed-{seed}" for seed in run.seeds)]
    starts = [start for folder in folders for start in read_starts(folder)]
    [row] = comparison.overview([run])
    return render(
        "run_page.html",
        run=run,
        row=row,
        name=run.folder.resolve().name,
        curves=curves([run]),
        result=_text(run.folder / RESULT_FILE),
        pictures=[(path.name, _embedded(path)) for path in _pictures(run.folder)],
        starts=sorted(starts, key=lambda start: str(start.get("when", ""))),
        versions=_versions(starts),
        groups=_groups(run.config),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **more,
    )


def curves(runs: Sequence[Run]) -> str:
    """The metrics of runs as an SVG element; empty where there are none."""
    try:
        figure = comparison.figure(runs)
    except ValueError:
        return ""
    file = io.StringIO()
    import matplotlib  # a third of a second

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()[file.getvalue().index("<svg") :]


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled in; what is said in values is escaped."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals.update(back="", refresh=0)
    environment.filters["clock"] = lambda when: datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M")
    return environment


def _pictures(folder: Path) -> list[Path]:
    """What was drawn, but for the curves, of which the page has its own."""
    return sorted(path for path in folder.glob("*.png") if path.name != "curves.png" and path.is_file())


def _embedded(path: Path) -> str | None:
    """A picture as an address that holds it; None of one that is too large or cannot be read."""
    try:
        if path.stat().st_size > _LARGEST_PICTURE:
            return None
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _versions(starts: Sequence[Mapping[str, Any]]) -> str:
    """Those of the last start, in a line."""
    versions = starts[-1].get("versions") if starts else None
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def _groups(config: Mapping[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """The configuration by the first part of its names."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, value in config.items():
        group, dot, rest = name.partition(".")
        groups.setdefault(group if dot else "", []).append((rest if dot else name, value))
    return groups
