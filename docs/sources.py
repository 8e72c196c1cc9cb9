"""A griffe extension: `Source:` in a docstring is a paragraph like others, not a box with half of it as its title."""

import re
from typing import Any

import griffe


class Sources(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^(Sources?):(?= \S)", r"*\1*:", _joined(obj.docstring.value), flags=re.MULTILINE
            )


def _joined(text: str) -> str:
    """Lines that go on from `Source:` without their indentation, which would make them code."""
    return re.sub(
        r"^Sources?: .*(?:\n[ ]+\S.*)+", lambda found: re.sub(r"\n[ ]+", "\n", found[0]), text, flags=re.MULTILINE
    )
