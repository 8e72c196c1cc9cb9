"""Forward-mode differentiation of models: `ssm.forward_mode` and `m2.forward_mode` together."""

import contextlib
from collections.abc import Iterator

import m2
import ssm


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, operations and models have the derivatives that JAX derives; see `ssm.forward_mode`.

        with zoo.forward_mode():
            logits, tangents = jax.jvp(lambda params: nnx.merge(graphdef, params)(ids), (params,), (direction,))

    A product of a Hessian with a vector, `jax.jvp` of `jax.grad`, needs none of it.

    Examples:
      >>> mixer = ssm.Mamba(8, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 4, 8))
      >>> with zoo.forward_mode():
      ...     value, change = jax.jvp(mixer, (x,), (x,))
      >>> change.shape
      (1, 4, 8)
    """
    with ssm.forward_mode(), m2.forward_mode():
        yield
