"""Forms of one operation, chosen by the platform that the program is for.

Not by that of the process, which may lower a program for another one (`jax.export`, a CPU that compiles ahead for TPU).
"""

from collections.abc import Callable
from typing import Any

from jax import lax


def by_platform(cpu: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Any) -> Any:
    """`cpu(*operands)` in a program for a CPU, `elsewhere(*operands)` in one for any other platform.

    Both are traced and must return the same shapes and dtypes, one is lowered. Under a transformation that needs
    derivatives each would keep its own residuals, so call this inside the rules of a `jax.custom_vjp`.
    """
    if cpu is elsewhere:
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=elsewhere)
