"""Forward-mode differentiation of what has its gradient written by hand.

The operations here have gradients of their own (`jax.custom_vjp`), which are reverse mode: `jax.grad`, `jax.vjp`, and
products of a Hessian with a vector, `jax.jvp(jax.grad(loss), (x,), (v,))`. JAX does not take such a function through
`jax.jvp`, `jax.linearize` or `jax.jacfwd` themselves. For those there is

    with ssm.forward_mode():
        y, dy = jax.jvp(operation, (x,), (dx,))

inside which operations are traced without gradients of their own, so that JAX derives them. Values are the same. What
was jitted outside is traced again: the mode is part of the key that compiled programs are kept by.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

_forward: Any = jax.make_user_context(False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, operations have the derivatives that JAX derives, of both modes; see the module.

    Examples:
      >>> def f(x):
      ...     return ssm.causal_conv1d(x, jnp.ones((1, 2)))[0].sum()
      >>> with ssm.forward_mode():
      ...     value, slope = jax.jvp(f, (jnp.ones((1, 3, 1)),), (jnp.ones((1, 3, 1)),))
      >>> float(slope)
      5.0
    """
    with _forward(True):
        yield


def in_forward_mode() -> bool:
    """Whether what is traced here has to be something that JAX can derive: no kernel, no gradient by hand."""
    return bool(_forward.value)


def by_hand(function: Any, named: str, context: str = "ssm.forward_mode()") -> Callable[..., Any]:
    """A `jax.custom_vjp` function; inside `forward_mode` what it wraps.

    Args:
      function: the one with its gradient written by hand.
      named: what an error calls it.
      context: what the error says to use.

    Raises:
      TypeError: forward mode outside of `forward_mode`. Inside `jax.jit` it is JAX's own error.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if in_forward_mode():
            return function.__wrapped__(*args)
        try:
            return function(*args)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                f"{named} has its gradient written by hand, for jax.grad and jax.vjp (and jax.jvp of jax.grad); "
                f"jax.jvp and jax.linearize of it go inside `with {context}:`"
            ) from error

    return run
