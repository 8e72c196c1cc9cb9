"""The files that lie beside a model's weights, copied from one folder to another: of known names, and no others.

What others packed may hold links to any file of this machine, pipes and devices: those are errors that name them.
"""

from collections.abc import Iterable
from pathlib import Path

from experiments.data.inside import what_is_wrong

NAMES = (
    *("preprocessor_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""What a published model has beside its weights."""
# The largest published tokenizer has 35 MB.
MAX_BYTES = 256 * 2**20


def find_companions(folder: Path, patterns: Iterable[str] = NAMES) -> list[Path]:
    """Those of some files that are in a folder.

    Args:
      folder: a published model's.
      patterns: names, or patterns of names.

    Raises:
      ValueError: one is a link out of the folder, no file, or too large: names it.
    """
    found = []
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        wrong = what_is_wrong(path, folder)
        if not wrong and not path.is_file():
            wrong = "is a folder"
        if not wrong and path.stat().st_size > MAX_BYTES:
            wrong = f"has {path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that such a file may have"
        if wrong:
            raise ValueError(f"{path} {wrong}; remove it, or put the file itself in its place")
        found.append(path)
    return found


def copy_companions(paths: Iterable[Path], folder: Path, target: Path) -> None:
    """Copies files of a folder to the same places in another."""
    for path in paths:
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, place.open("wb") as copy:
            copy.write(source.read(MAX_BYTES))
