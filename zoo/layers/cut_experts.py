"""A mixture of experts over devices: each has its own positions, and with "expert" some of the experts.

Rows lie over data, fsdp and expert. Along "expert" the devices of a group gather what theirs have in common, each
computes what its experts make of it, and the sum over the group, of which each keeps its own rows, is the mixture. So
what is exchanged has one size whatever is chosen, and no position is dropped. Rows that the axis does not divide, one
prompt, say, are the same along it. Left to the compiler, the choices of all positions would be sorted on every device.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from zoo.layers.mesh_axes import POSITIONS, ROWS, ambient_sizes

EXPERT = "expert"


def shared_out(
    mix: Callable[..., Float[Array, "b l d"]],
    experts: Any,
    x: Float[Array, "b l d"],
    chosen: Int[Array, "b l s"],
    weights: Float[Array, "b l s"],
    key: Any,
    *,
    n_experts: int,
) -> Float[Array, "b l o"]:
    """mix(experts, x, chosen, weights, key), on each device with its own positions and its own experts.

    Args:
      mix: takes some of the experts, and choices among these, their number where a position chose none of them.
      experts: a module, whose parameters have a row for each expert.
      x, chosen, weights: of each position; chosen are 0 to n_experts, which is none.
      key: of dropout, or None.
      n_experts: how many there are.

    Raises:
      ValueError: the ambient mesh's axis "expert" does not divide them.
    """
    sizes = ambient_sizes()
    devices = sizes.get(EXPERT, 1)
    if n_experts % devices:
        raise ValueError(f"n_experts={n_experts}, expected a multiple of --mesh.expert {devices}")
    rows = tuple(axis for axis in ROWS if axis in sizes)
    while rows and x.shape[0] % math.prod(sizes[axis] for axis in rows):
        rows = rows[:-1]
    length, pieces = x.shape[1], sizes.get(POSITIONS, 1)
    along = POSITIONS if pieces > 1 and length >= pieces else None
    axes = {*rows, *([along] if along else []), *([EXPERT] if devices > 1 else [])}
    if not axes:
        return mix(experts, x, chosen, weights, key)
    if along and length % pieces:
        missing = ((0, 0), (0, -length % pieces), (0, 0))
        x, weights = jnp.pad(x, missing), jnp.pad(weights, missing)
        chosen = jnp.pad(chosen, missing, constant_values=n_experts)
    graphdef, params = nnx.split(experts)
    positions, own = PartitionSpec(rows, along), PartitionSpec(EXPERT if devices > 1 else None)

    def local(params, x, chosen, weights, key):
        if key is not None:
            for axis in sorted(axes):
                key = jax.random.fold_in(key, lax.axis_index(axis))
        if devices == 1:
            return mix(nnx.merge(graphdef, params), x, chosen, weights, key)
        if EXPERT in rows:
            x, chosen, weights = (lax.all_gather(a, EXPERT, tiled=True) for a in (x, chosen, weights))
        n = n_experts // devices
        mine = chosen - lax.axis_index(EXPERT) * n
        mine = jnp.where((mine >= 0) & (mine < n), mine, n)
        y = mix(nnx.merge(graphdef, params), x, mine, weights, key)
        return lax.psum_scatter(y, EXPERT, tiled=True) if EXPERT in rows else lax.psum(y, EXPERT)

    run = jax.shard_map(
        local,
        in_specs=(own, positions, positions, positions, PartitionSpec()),
        out_specs=positions,
        axis_names=axes,
        check_vma=False,
    )
    return jax.jit(run)(params, x, chosen, weights, key)[:, :length]
