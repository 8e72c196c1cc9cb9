"""Where tests find files: the repository, and models that were published or made in a published layout."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "tests" / "published"  # how they were made: its README.md
