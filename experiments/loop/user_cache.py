"""The folder of this project among a user's caches: tokens, fetched data, compiled programs."""

import os
from pathlib import Path


def user_cache() -> Path:
    """subquadratic-zoo in $XDG_CACHE_HOME or ~/.cache. Nothing is made."""
    return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "subquadratic-zoo").expanduser()
