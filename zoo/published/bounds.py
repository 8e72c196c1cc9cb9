"""What a config claims, held against the files before anything is made of it.

Each block of a model has a tensor at least, and each dimension of a parameter is no longer than all values that there
are. So a config of a few bytes makes nothing that takes more memory or time than the files that lie beside it explain.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from zoo.published.tensors import Json
from zoo.published.weight_files import LazyTensor

# How many blocks there are, in the layouts, and what has an element or a letter for each.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OF_LAYERS = ("hybrid_override_pattern", "layers_block_type", "layer_types", "attn_layer_indices", "attn_layer_idx")
# Sizes that are whole and at least 1, or null where something follows from others.
_SIZES = (
    *("hidden_size", "d_model", "dim", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "state_size", "conv_kernel", "ssm_state_size", "mamba_num_heads", "mamba_head_dim"),
    *("mamba_d_state", "mamba_d_conv", "mamba_n_heads", "mamba_n_groups", "mamba_ngroups", "n_mamba_heads", "n_groups"),
    *("num_heads", "attn_layer_period", "expert_layer_period", "num_mem_blocks", "patch_size", "image_size"),
    *("num_channels", "max_position_embeddings", "type_vocab_size", "global_attn_every_n_layers", "local_attention"),
    *("long_conv_l_max", "hyena_emb_dim", "hyena_filter_order", "monarch_mlp_nblocks", "pad_vocab_size_multiple"),
)
_MAY_BE_ZERO = ("intermediate_size", "type_vocab_size", "local_attention")
_WIDTHS = ("hidden_size", "d_model", "dim", "long_conv_l_max", "hyena_emb_dim", "l_max", "emb_dim")
# Names of positions and of features of M2's filters, as M2-BERT's files say them and as ours do.
_FILTERS = (("long_conv_l_max", "l_max"), ("hyena_emb_dim", "emb_dim"))
_FEW_VALUES = 1 << 22
# A run of any model has fewer; blocks that share their parameters have no tensors each.
_MOST_LAYERS = 100_000
# Values beyond those in the files that a model may have before it is refused, and not only found to lack tensors.
_SLACK = 1 << 24


def require_counts(raw: Json, n_tensors: int) -> None:
    """Raises a ValueError where a size in a config is none, or there are more blocks than tensors in the files.

    Args:
      raw: a published config.
      n_tensors: in the files.
    """
    for name in (*_LAYERS, *_SIZES):
        value = raw.get(name)
        least = 0 if name in _MAY_BE_ZERO else 1
        if isinstance(value, list) and name in ("image_size", "patch_size"):
            continue
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r:.40}, expected a whole number from {least} on")
    for name in (*_LAYERS, *_OF_LAYERS):
        value = raw.get(name)
        count = len(value) if isinstance(value, str | list) else value if type(value) is int else 0
        if count > max(n_tensors, 64):  # a few too many are better told by the tensors that are missing
            raise ValueError(f"{name} says {count:,} layers, the files hold {n_tensors:,} tensors: expected no more")


def require_widths(said: Any, tensors: Iterable[LazyTensor]) -> None:
    """Raises a ValueError where a width, or filters of some widths, have more values than the files have bytes.

    What a model computes once, from NumPy, is as long: it must not be made before this.

    Args:
      said: what a config file says, of this library or others.
      tensors: in the files.
    """
    most = max(_FEW_VALUES, count_bytes(tensors))
    for there in _objects(said):
        sizes = {name: there[name] for name in _WIDTHS if type(there.get(name)) is int}
        words = re.findall(rf"({'|'.join(_WIDTHS)})=(\d{{1,30}})", str(there.get("pattern", "")))
        for name, size in [*sizes.items(), *((name, int(size)) for name, size in words)]:
            if size > most:
                raise ValueError(f"{name}={size:,}, more than the values in the files, {most:,} at most")
    positions, features = (
        max((there[name] for there in _objects(said) for name in names if type(there.get(name)) is int), default=1)
        for names in _FILTERS
    )
    if positions * features > most:
        raise ValueError(
            f"filters of {positions:,} positions by {features:,} features, more than the values in the files"
        )


def _objects(said: Any, depth: int = 4) -> Iterator[dict]:
    """An object of JSON and those in it."""
    if isinstance(said, dict):
        yield said
        for value in said.values() if depth else ():
            yield from _objects(value, depth - 1)


def require_layers(n_layers: Any, pattern: Any, n_tensors: int) -> None:
    """Raises a ValueError where a config of ours has more blocks than could have tensors.

    Args:
      n_layers, pattern: what it says, of any type.
      n_tensors: in the files.
    """
    most = _MOST_LAYERS if "@" in str(pattern) else max(n_tensors, 64)
    if isinstance(n_layers, int) and n_layers > most:
        raise ValueError(f"n_layers={n_layers:,}, the files hold {n_tensors:,} tensors: expected at most {most:,}")


def require_values(params: Mapping[tuple, Any], tensors: Iterable[LazyTensor]) -> None:
    """Raises a ValueError where a model has far more values than the files have bytes.

    Args:
      params: with shapes alone.
      tensors: of the files. Those that overlap, or repeat a value, count once.
    """
    described = sum(param.size for param in params.values())
    held = count_bytes(tensors)
    if described > held + _SLACK:
        raise ValueError(f"the config describes {described:,} parameters, the files hold {held:,} bytes of them")


def count_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes that some tensors take together, where each counts once."""
    spans = sorted(np.lib.array_utils.byte_bounds(tensor.mapped) for tensor in tensors if tensor.mapped.size)
    total, end = 0, 0
    for low, high in spans:
        total += max(0, high - max(low, end))
        end = max(end, high)
    return total
