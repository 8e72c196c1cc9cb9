"""Errors about unknown names: every one lists the known names and points at the nearest."""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A message for a name that is not known: `unknown mixer 'manba', did you mean 'mamba'? Known: attn, mamba`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f", did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{guess} Known: {', '.join(known)}"
