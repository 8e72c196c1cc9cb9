"""A smaller model out of a trained one: units, layers and tokens go that are needed least, the others make up for it.

    small = zoo.prune(model, batches, d_ff=1024, n_heads=6, n_layers=20)

What is needed is read off a few batches of text or images (`calibration`, `importance`). Where channels or heads go,
every map that reads them is refitted to those that stay (`compensation.refit`), so that in each map less is lost than
by cutting alone; a unit that says nothing, or what another says, goes at no cost. Then the model is trained on, best
with the large one as its teacher.

    width      units                                     what stays together
    d_ff       hidden channels                           as many in each block of a Monarch MLP
    n_heads    attention's heads, with their keys        as many query heads for each head of keys
               Mamba-2's and -3's heads                  as many in each group that shares B and C
               Mamba-1's inner channels                  -
    d_model    channels between the blocks               M2's inner channels too; as many of each shared filter

Source: Muralidharan et al. 2024, arXiv:2407.14679, and Taghibakhshi et al. 2025, arXiv:2504.11409 (Minitron, and heads
of state spaces in groups); Kurtic et al. 2023, arXiv:2302.04089 (which units, and what makes up for them).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from zoo.models.build import Model
from zoo.reuse.calibration import calibrate
from zoo.reuse.choose_units import Wanted, choose
from zoo.reuse.cut_layers import with_layers, without_channel_mixers
from zoo.reuse.cut_units import without
from zoo.reuse.cut_vocabulary import with_vocabulary
from zoo.reuse.grow import require_language
from zoo.stack.pattern import parse_pattern


def prune(
    model: Model,
    calibration: Iterable[Mapping[str, Array]],
    *,
    d_model: int | None = None,
    d_ff: int | Sequence[int] | None = None,
    n_heads: int | Mapping[str, int] | None = None,
    n_layers: int | Sequence[int] | None = None,
    vocabulary: Sequence[int] | None = None,
    importance: Mapping[str, Float[np.ndarray, "n"]] | None = None,
    compensate: bool = True,
) -> Model:
    """A smaller model of a trained one.

    Layers go first, then widths, by what is read after that. Inner widths do not follow d_model.

    Args:
      model: a causal or masked language model of attention, linear attention, Mamba-1, -2 or -3, M2, with dense or
        block-diagonal channel mixers or experts.
      calibration: batches as `calibrate` takes them; a few thousand positions of what the model is for.
      d_model: channels between the blocks.
      d_ff: hidden channels of channel mixers, of each expert the same; or one for each dense channel mixer, in order,
        see `layer_sizes`, where 0 is none: then the pattern's words say them.
      n_heads: heads of mixers, of Mamba-1 inner channels; or of each kind, {"attn": 6, "mamba2": 16}.
      n_layers: how many blocks, those that turn the residual stream most; or their numbers.
      vocabulary: ids of the tokens that stay, in the order of their new ids.
      importance: of each unit of some widths, as `gate_scores` gives it: the largest stay. None: those go one by one
        that cost least.
      compensate: whether what is left makes up for what goes. False: for comparison.

    Returns:
      A model of the same kind, with arrays of its own.

    Raises:
      ValueError: nothing asked for; more than there is, or a number that groups or blocks do not allow; parts whose
        widths cannot be changed, options in the pattern that say a width; no batches.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> smaller = zoo.prune(model, [{"ids": jnp.arange(24).reshape(2, 12)}], d_model=8, n_layers=1)
      >>> smaller.config.d_model, smaller.config.n_layers
      (8, 1)
    """
    require_language(model)
    if (d_model, d_ff, n_heads, n_layers, vocabulary) == (None,) * 5:
        raise ValueError("expected one of d_model, d_ff, n_heads, n_layers and vocabulary")
    if importance and n_layers is not None:
        raise ValueError("importance with n_layers: units are those of a model whose layers went before")
    batches = [dict(batch) for batch in calibration]
    if not batches:
        raise ValueError("calibration=(), expected one batch at least")
    if n_layers is not None:
        model = with_layers(model, batches, n_layers)
    if d_ff is not None and not isinstance(d_ff, int):
        model, d_ff = _with_mixers(model, d_ff)
    wanted = Wanted(d_model, d_ff, n_heads)
    if wanted != Wanted():
        moments = calibrate(model, batches)
        model = without(model, moments, choose(model, moments, wanted, importance), compensate=compensate)
    return model if vocabulary is None else with_vocabulary(model, vocabulary)


def _with_mixers(model: Any, d_ff: Sequence[int]) -> tuple[Any, int | tuple[int, ...] | None]:
    """A model without the channel mixers of which nothing is left, and how large the others shall be."""
    words = parse_pattern(model.config.pattern, model.config.n_layers)
    blocks = [i for i, word in enumerate(words) if word.channel]
    if len(d_ff) != len(blocks) or {words[i].channel for i in blocks} != {"mlp"} or min(d_ff) < 0:
        raise ValueError(
            f"d_ff={tuple(d_ff)} with pattern={model.config.pattern!r}, expected one of at least 0 for each mlp, "
            "and no other channel mixers"
        )
    if gone := [i for i, n in zip(blocks, d_ff, strict=True) if n == 0]:
        model = without_channel_mixers(model, gone)
    left = tuple(n for n in d_ff if n)
    return model, (left[0] if len(set(left)) == 1 else left or None)
