"""What a mixer asks of the stack around it, and what it gives besides its output: a few attributes that say so.

    needs               names of what its calls take besides x, by keyword; see `GIVEN`
    has_norm            it has a norm itself, so its block puts none before it
    has_auxiliary_loss  it has `run`, which is `__call__` with what training adds to its loss: (y, loss)
    runs_cut            it may be called with rows whose positions are cut over devices (`ssm.sequence_cut`)
    carries             its state is of one size: a row may be run piece by piece (`zoo.stack.pieces`)
    in_groups           it has `in_groups(x, width, ...)`, which is `__call__` on some channels at a time
    shared_name, make_shared   static methods of one that needs "shared": the name of the module that it reads, by its
                        options, and that module, made once for all depths that name it

They stand on the mixer's class; `needs` on its options, where it depends on them.

    class Stencil(ssm.Mixer):
        needs = ("grid",)

        def __call__(self, x, *, grid, mask=None, segment_ids=None): ...

A sequence mixer is always given mask and segment_ids; a channel mixer only what it needs. What a mask says is in
`ssm.mixer`; a stack gives no gaps, and 0 where a position is not there.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers.names import unknown_name

POSITIONS = ("mask", "segment_ids")
# What there is to ask for, and what it is. A grid is not there in generation, piece by piece.
GIVEN = {
    "mask": "False where a position is not there, or None",
    "segment_ids": "documents packed in a row, each a run of equal ids, or None",
    "ahead": "who sees what comes later (`zoo.layers.seen`), or None; a mixer that cannot say so refuses it",
    "positions": "the place of each position in its row, where a block leaves some out (`zoo.stack.depths`), or None",
    "grid": "rows and columns of the image whose places the positions are",
    "embeddings": "what entered the first block, b l d",
    "shared": "modules that several depths read, by name",
}

_OR_NONE = ("ahead", "positions")


def has(mixer: Any, attribute: str) -> bool:
    """Whether a mixer, or its class, says so."""
    return bool(getattr(mixer, attribute, False))


def needs_of(constructor: Callable, options: Any) -> tuple[str, ...]:
    """What a mixer with these options needs: as they say, or else as its class says.

    Raises:
      ValueError: something that no stack gives (naming the nearest), or "shared" without saying what that is.
    """
    needs = tuple(getattr(options, "needs", getattr(constructor, "needs", ())))
    for name in needs:
        if name not in GIVEN:
            raise ValueError(unknown_name("need", name, GIVEN))
    for name in ("shared_name", "make_shared") if "shared" in needs else ():
        if not hasattr(constructor, name):
            raise ValueError(f"it needs 'shared' modules, expected a static method {name}")
    return needs


def needs_of_state(needs: Collection[str]) -> tuple[str, ...]:
    """What of that `init_state` takes too: shared modules, which may have a say in what is carried."""
    return tuple(name for name in needs if name == "shared")


def hand(mixer: Any, needs: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a mixer is called with, of what there is.

    Raises:
      ValueError: it needs a grid, and there is none.
    """
    if "grid" in needs and given.get("grid") is None:
        raise ValueError(f"{type(mixer).__name__} mixes images, expected grid=(rows, columns)")
    return {name: given.get(name) if name in _OR_NONE else given[name] for name in needs}


def run_mixer(mixer: Any, x: Float[Array, "b l d"], **handed: Any) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
    """The output of a mixer and what training adds to its loss, 0 where it adds nothing."""
    if has(mixer, "has_auxiliary_loss"):
        return mixer.run(x, **handed)
    return mixer(x, **handed), jnp.float32(0)
