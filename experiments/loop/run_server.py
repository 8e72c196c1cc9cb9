"""Runs in a browser: a small server on this machine with a list of runs, a page for each, some side by side."""

import http.server
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.loop import comparison
from experiments.loop.history import Run, find_runs, is_run, read_run
from experiments.loop.run_page import curves, page, render


class RunServer(http.server.ThreadingHTTPServer):
    """Serves the runs below a folder; reads them anew for each page, and writes nothing.

    Args:
      root: a folder of runs.
      host, port: where to listen; port 0 takes one that is free.
    """

    daemon_threads = True

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 8000):
        self.root, self.host = root.resolve(), host
        super().__init__((host, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{self.server_name if self.host == '0.0.0.0' else self.host}:{self.server_port}/"

    def answer(self, target: str) -> str | None:
        """The page for a request's target; None where there is none.

        /                      the list
        /run/NAME              a run; NAME is its path below the root
        /compare?run=A&run=B   some of them
        """
        url = urllib.parse.urlsplit(target)
        path, asked = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query).get("run", [])
        if path == "/":
            return self._list()
        if path == "/compare":
            runs = [run for name in asked for run in self._run(name)]
            return self._compare(runs) if runs else None
        if path.startswith("/run/"):
            for run in self._run(path.removeprefix("/run/")):
                return page(run, back="/", refresh=0 if _ended(run) else 30)
        return None

    def _run(self, name: str) -> list[Run]:
        """The run of that name in a list, or nothing where none below the root is called so."""
        folder = (self.root / name).resolve()
        return [read_run(folder)] if folder.is_relative_to(self.root) and folder.is_dir() and is_run(folder) else []

    def _name(self, run: Run) -> str:
        return run.folder.resolve().relative_to(self.root).as_posix()

    def _list(self) -> str:
        found = sorted(find_runs(self.root), key=lambda run: run.when or 0, reverse=True)
        rows = [
            row | {"run": self._name(run), "problems": run.problems}
            for run, row in zip(found, comparison.overview(found), strict=True)
        ]
        return render("run_list.html", root=str(self.root), rows=rows)

    def _compare(self, runs: Sequence[Run]) -> str:
        rows: Sequence[Mapping[str, Any]] = comparison.differences(runs)
        names = dict.fromkeys(name for row in rows for name in row)
        lines = {name: [comparison.text_of(row.get(name, "")) for row in rows] for name in names}
        return render("run_comparison.html", lines=lines, n_runs=len(rows), curves=curves(runs))


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RunServer

    def do_GET(self) -> None:
        try:
            text = self.server.answer(self.path)
            status = 404 if text is None else 200
        except (OSError, ValueError) as error:  # a run that is deleted meanwhile, a name that is no path
            text, status = str(error), 500
        body = (text if text is not None else "There is no such run.").encode()
        self.send_response(status)
        self.send_header("Content-Type", f"text/{'html' if status == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing of each request."""


def _ended(run: Run) -> bool:
    return run.asked is not None and run.steps >= run.asked
