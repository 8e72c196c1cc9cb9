"""States under names of their own in what `jax.export` writes, so that a program read back takes and gives them."""

from typing import Any

import jax.export


def serializable(name: str) -> Any:
    """Registers a NamedTuple under a name that stays, whatever its class or module come to be called.

    A class that is made again, as a notebook's reload does, is left to the first one of that name.
    """

    def register(kind: Any) -> Any:
        try:
            return jax.export.register_namedtuple_serialization(kind, serialized_name=name)
        except ValueError:
            return kind

    return register
