"""Where a hybrid's attention and MLPs go: the allocator of NVIDIA's study of hybrids."""

from collections.abc import Sequence

from zoo.stack.pattern import LETTERS, Style, canonical_pattern


def hybrid_pattern(n_layers: int = 56, attention: float = 0.08, mlp: float = 0.5, *, style: Style = "words") -> str:
    """The pattern of a hybrid of Mamba-2, attention and MLPs, each a block of its own, as evenly spread as can be.

        hybrid_pattern(12, style="megatron")  ->  "M-M-M-*-M-M-"

    Attention divides the stack into equal runs. MLPs then divide what is left, each behind its run, so that the stack
    begins with Mamba-2 and ends with an MLP.

    Args:
      n_layers: number of blocks.
      attention: share of them that are attention, 0 to 1, rounded to whole blocks.
      mlp: likewise for MLPs. The rest is Mamba-2.
      style: in words, or in Megatron's letters.

    Raises:
      ValueError: shares that are not shares, or more than there are blocks.

    Examples:
      >>> zoo.hybrid_pattern(10, attention=0.1, mlp=0.4)
      'mamba2 -/mlp mamba2*2 -/mlp attn (mamba2 -/mlp)*2'

    Source: Waleffe et al. 2024, arXiv:2406.07887; megatron/core/ssm/mamba_hybrid_layer_allocation.py in
      NVIDIA/Megatron-LM. The defaults are those of the 8B hybrid.
    """
    n_attention, n_mlp = round(n_layers * attention), round(n_layers * mlp)
    if attention < 0 or mlp < 0 or n_attention + n_mlp > n_layers:
        raise ValueError(
            f"attention={attention} and mlp={mlp}, expected shares of n_layers={n_layers}, at most 1 together"
        )
    letters = ["M"] * n_layers
    if n_attention:
        for i in _spread(range(n_layers), (n_layers - n_attention) / (n_attention + 1)):
            letters[i] = "*"
    if n_mlp:
        rest = [i for i, letter in enumerate(letters) if letter == "M"]
        for i in _spread(rest, (n_layers - n_attention - n_mlp) / n_mlp):
            letters[i] = "-"
    return canonical_pattern(" ".join(LETTERS[letter] for letter in letters), n_layers, style)


def _spread(places: Sequence[int], run: float) -> list[int]:
    """Every place that comes after a run of `run` others, on average."""
    chosen, left = [], run
    for place in places:
        if left < 0.5:
            chosen.append(place)
            left += run
        else:
            left -= 1
    return chosen
