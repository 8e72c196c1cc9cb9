"""Rows or files that are left out on request: the first few are named, all are counted."""

from collections.abc import Callable


class LeftOut:
    """Called with what is wrong with each.

    Args:
      say: where it is told.
      what: what they are, for the count.
      limit: how many are named.
    """

    def __init__(self, say: Callable[[str], None], what: str, limit: int = 10):
        self.say, self.what, self.limit, self.n = say, what, limit, 0

    def __call__(self, message: str) -> None:
        self.n += 1
        if self.n <= self.limit:
            self.say(f"{message}; left out")

    def summary(self, kept: int) -> None:
        """Says how many there were, beside those that were kept."""
        if self.n:
            self.say(f"{self.n} of {self.n + kept} {self.what} left out, as --data.skip-bad asks")
