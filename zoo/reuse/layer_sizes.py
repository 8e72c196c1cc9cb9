"""How many hidden channels each layer keeps, so that a model is as fast as asked and loses least.

    d_ff = zoo.layer_sizes(model, batches, times={0: 0.0, 256: 0.4, 512: 0.7, 1024: 1.3}, budget=9.5)
    small = zoo.prune(model, batches, d_ff=d_ff)

How long a channel mixer of each size takes is measured where the model shall run. What a layer loses at each size, as a
share of what it gives, is known when its channels have gone one by one, the others making up for each. Then of all
choices of a size for each layer within the time, one that loses least in the sum is found layer by layer.

Source: Kurtic et al. 2023, arXiv:2302.04089 (ZipLM; the search over layers is dynamic programming, as in
Frantar & Alistarh 2022, arXiv:2203.04466).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array

from zoo.layers.mlp import MLP
from zoo.models.build import Model
from zoo.reuse.calibration import calibrate
from zoo.reuse.choose_units import prunable_widths, readers_of
from zoo.reuse.grow import require_language
from zoo.reuse.importance import removals

_TICKS = 10_000


def layer_sizes(
    model: Model, calibration: Iterable[Mapping[str, Array]], *, times: Mapping[int, float], budget: float
) -> tuple[int, ...]:
    """How many hidden channels each dense channel mixer of a model keeps, in order.

    Args:
      model: as for `zoo.prune`, with dense channel mixers.
      calibration: batches as `calibrate` takes them.
      times: how long one channel mixer takes, by its hidden channels; 0 channels: there is none. Those that a layer
        does not have so many of are not its choices.
      budget: how long all of them may take together, in the unit of `times`.

    Raises:
      ValueError: no dense channel mixers; a budget that the smallest sizes do not keep to; negative times.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="mamba/mlp")
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> times = {0: 0.0, 16: 0.3, 32: 0.5, 64: 1.0}
      >>> sizes = zoo.layer_sizes(model, [{"ids": jnp.arange(24).reshape(2, 12)}], times=times, budget=1.1)
      >>> sum(times[n] for n in sizes) <= 1.1
      True
    """
    require_language(model)
    mixers = [path for path, module in nnx.iter_modules(model) if type(module) is MLP and path[-1:] != ("shared",)]
    mixers.sort(key=lambda path: [part for part in path if isinstance(part, int)])
    if not mixers:
        raise ValueError("expected a model with dense channel mixers")
    axes, moments = prunable_widths(model), calibrate(model, calibration)
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    lost = []
    for mixer in mixers:
        path, width = (*mixer, "down_proj", "kernel"), ".".join(map(str, (*mixer, "d_ff")))
        n = params[path].shape[0]
        _, after = removals(readers_of(path, params[path], axes[path], moments, width), n)
        lost.append({size: float(after[n - size]) for size in times if size <= n})
    return least_lost(lost, times, budget)


def least_lost(
    lost: Sequence[Mapping[int, float]], times: Mapping[int, float], budget: float, *, ticks: int = _TICKS
) -> tuple[int, ...]:
    """A size for each layer, of least loss in the sum, of those that take no longer than a budget together.

    Args:
      lost: of each layer, what it loses at each size.
      times: what each size takes, at least 0.
      budget: in the same unit.
      ticks: in how many parts the budget is counted. Times are rounded up to whole ones, so that the budget is kept
        to, and a choice that takes all of it but a tick for each layer may be missed; of whole ones it is the best.

    Raises:
      ValueError: negative times, or a budget that the smallest sizes do not keep to.
    """
    if min(times.values()) < 0 or budget < 0:
        raise ValueError(f"times={dict(times)} and budget={budget}, expected at least 0")
    tick = budget / ticks or 1.0
    taken = {size: int(np.ceil(time / tick - 1e-9)) for size, time in times.items()}
    best = np.zeros(ticks + 1)  # of the layers so far, by the ticks that there are for them
    choices = []
    for of_layer in lost:
        after, chosen = np.full(ticks + 1, np.inf), np.full(ticks + 1, -1)
        for size, loss in of_layer.items():
            if (n := taken[size]) > ticks:
                continue
            total = best[: ticks + 1 - n] + loss
            better = total < after[n:]
            after[n:][better], chosen[n:][better] = total[better], size
        best = after
        choices.append(chosen)
    if not np.isfinite(best[-1]):
        least = sum(min(times[size] for size in of_layer) for of_layer in lost)
        raise ValueError(f"budget={budget:g}, expected at least {least:g}, what the fastest sizes take")
    left, sizes = ticks, []
    for chosen in reversed(choices):
        sizes.append(int(chosen[left]))
        left -= taken[sizes[-1]]
    return tuple(reversed(sizes))
