"""What a contender of the benchmark is: sizes in, calls to time out."""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax

Pass = Literal["forward", "backward", "decode"]
PASSES: dict[Pass, str] = {"forward": "forward", "backward": "forward + backward", "decode": "decode, a token"}

Call = Callable[[], Any]  # runs to the end and returns its arrays


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that all contenders of a row are built for."""

    batch: int
    length: int
    d_model: int
    d_inner: int
    """Of the scan; the language models have twice d_model."""
    d_state: int
    layers: int
    vocab_size: int
    tokens: int
    """Length of the prompt before decoding, and tokens decoded by one call."""


Contender = Callable[[Sizes], dict[Pass, Call]]


class JaxCall:
    """A function, compiled at its first use, and its arguments.

    Args:
      function: what is compiled.
      arguments: its arguments, arrays or trees of arrays.
    """

    def __init__(self, function: Callable, *arguments: Any):
        self._function = function
        self._arguments = arguments

    def __call__(self):
        return jax.block_until_ready(self._compiled(*self._arguments))

    def memory(self) -> int:
        """Bytes of results and of what lives at the same time before them, as the compiler lays them out."""
        memory = self._compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    @functools.cached_property
    def _compiled(self):
        return jax.jit(self._function).lower(*self._arguments).compile()


class TorchCall:
    """A function of PyTorch without arguments."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function

    def __call__(self):
        return self._function()

    def memory(self) -> int:
        """Bytes that live at most beyond those before, in one more call, as PyTorch's profiler sees its allocator."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self._function()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # freed: negative
        return max(itertools.accumulate(sizes), default=0)


def jax_passes(run: Callable, of: Any, dy: Any, *arguments: Any) -> dict[Pass, Call]:
    """run(of, *arguments), and its gradient in `of` when its own is dy."""

    def both(of, dy, *arguments):
        return jax.vjp(lambda of: run(of, *arguments), of)[1](dy)[0]

    return {"forward": JaxCall(run, of, *arguments), "backward": JaxCall(both, of, dy, *arguments)}


def torch_passes(run: Callable[[], Any], of: Any, dy: Any) -> dict[Pass, Call]:
    """run(), and its gradient in the tensors `of` when its own is dy."""
    import torch

    forward = torch.no_grad()(run)
    return {"forward": TorchCall(forward), "backward": TorchCall(lambda: torch.autograd.grad(run(), of, dy))}


class Missing(Exception):
    """A contender that cannot run here, and what to do about it."""


def require(*packages: str) -> None:
    """Raises `Missing` unless the packages are installed."""
    absent = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if absent:
        raise Missing(f"pip install {' '.join(absent)}")
