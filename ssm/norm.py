"""Root-mean-square normalisation inside state-space mixers: of groups of channels, before or after a gate.

Source: mamba_ssm/ops/triton/layernorm_gated.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*b e"], *, group_size: int | None = None, eps: float) -> Float[Array, "*b e"]:
    """x over its root mean square, taken over each group of `group_size` neighbouring channels. At least float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = x.shape[-1] if group_size is None else group_size
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)  # not -1, which an empty array cannot tell
    return (groups * jax.lax.rsqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + eps)).reshape(x.shape)


class GatedRMSNorm(nnx.Module):
    """rms_norm(y * silu(z)) * scale, or rms_norm(y) * scale * silu(z) with `norm_before_gate`; in y's dtype.

    Without a gate, rms_norm(y) * scale. `axis` is what the channels are along.
    """

    def __init__(
        self,
        channels: int,
        *,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        axis: Any = None,
        param_dtype: Dtype = jnp.float32,
    ):
        self.group_size, self.norm_before_gate, self.eps = group_size or channels, norm_before_gate, eps
        scale = jnp.ones((channels,), jnp.promote_types(param_dtype, jnp.float32))
        self.scale = nnx.Param(scale, decay=False, axes=(axis,))

    def __call__(self, y: Float[Array, "*b e"], z: Float[Array, "*b e"] | None = None) -> Float[Array, "*b e"]:
        """Normalises y, gated by z."""
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        gate = 1 if z is None else jax.nn.silu(z.astype(wide.dtype))
        if not self.norm_before_gate:
            wide, gate = wide * gate, 1
        normed = rms_norm(wide, group_size=self.group_size, eps=self.eps)
        return (normed * self.scale[...] * gate).astype(y.dtype)
