"""A method that takes the arguments of another, which alone spells them out.

    @called_like(Encoder.run)
    def hidden(self, *inputs, **options) -> Float[Array, "b l d"]:
        return self.run(*inputs, **options)[0]

Type checkers, editors and `help` see the arguments of `Encoder.run`, and what `hidden` returns. What it passes on is
checked where it is spelled out.
"""

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Inputs = ParamSpec("Inputs")
Owner = TypeVar("Owner")
Output = TypeVar("Output")


def called_like(
    original: Callable[Concatenate[Any, Inputs], Any],
) -> Callable[[Callable[Concatenate[Owner, ...], Output]], Callable[Concatenate[Owner, Inputs], Output]]:
    """Says of a method that it takes what another method takes; of what it returns it says itself."""

    def say(method: Any) -> Any:
        theirs, own = inspect.signature(original), inspect.signature(method)
        method.__signature__ = theirs.replace(return_annotation=own.return_annotation)
        return method

    return say
