"""Images as tokens: patches, the positions of a grid, and where tokens that stand for the whole image go.

Axes: x image height, y image width, c channels (here alone); `grid` is (rows, columns) of patches.
"""

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from m2.mlp import gelu

Stem = Literal["patch", "conv"]


class PatchEmbedding(nnx.Module):
    """Cuts images into square patches and maps each to a vector.

    patch  one convolution as wide as a patch
    conv   3x3 convolutions of stride 2 with GELU between, each halving the image and doubling the width, then a 1x1
           one: what lets state spaces and attention train faster early on (patch_size is a power of 2)

    Args:
      d_model: width of the vectors.
      patch_size: pixels to a side of a patch.
      stride: pixels from one patch to the next.
      channels: of the images.
      stem: which.
      bias: whether the last convolution has one.
      dtype: of the computation.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Source: Dosovitskiy et al. 2020, arXiv:2010.11929; the stem: Xiao et al. 2021, arXiv:2106.14881.
    """

    def __init__(
        self,
        d_model: int,
        *,
        patch_size: int,
        stride: int,
        channels: int,
        stem: Stem = "patch",
        bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.stride = patch_size, stride
        conv = functools.partial(
            nnx.Conv,
            kernel_init=jax.nn.initializers.lecun_normal(),
            kernel_metadata={"axes": (None, None, None, "embed")},
            bias_metadata={"decay": False, "axes": (None,)},
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        halvings = patch_size.bit_length() - 1
        if stem == "conv":
            widths = [channels, *(max(1, d_model >> (halvings - 1 - i)) for i in range(halvings))]
            self.stem = nnx.List([conv(a, b, (3, 3), strides=2, padding=1) for a, b in itertools.pairwise(widths)])
            self.projection = conv(widths[-1], d_model, (1, 1), use_bias=bias)
        else:
            self.stem = nnx.List([])
            size, strides = (patch_size, patch_size), (stride, stride)
            self.projection = conv(channels, d_model, size, strides=strides, padding="VALID", use_bias=bias)

    def __call__(self, images: Float[Array, "b x y c"]) -> Float[Array, "b r s d"]:
        """A vector for each patch, in rows and columns."""
        for layer in self.stem:
            images = gelu(layer(images))
        return self.projection(images)


def grid_of(height: int, width: int, patch_size: int, stride: int, crop: bool = False) -> tuple[int, int]:
    """Rows and columns of the patches of an image.

    Args:
      height, width: of the image, in pixels.
      patch_size: pixels to a side of a patch.
      stride: pixels from one patch to the next.
      crop: whether pixels right and below that no patch covers are left out.

    Raises:
      ValueError: patches do not cover the image exactly, without crop; or there is none.
    """
    for name, size in (("height", height), ("width", width)):
        if size < patch_size or ((size - patch_size) % stride and not crop):
            raise ValueError(
                f"images of {height} x {width} pixels: {name}={size}, expected patch_size={patch_size} and a "
                f"multiple of {stride} more"
            )
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def sincos_positions(grid: tuple[int, int], d_model: int) -> Float[Array, "l d"]:
    """Sines and cosines of the row and of the column of each patch: a position that need not be learned.

    Source: `posemb_sincos_2d` of Beyer et al. 2022, arXiv:2205.01580 (column first, base 10,000).
    """
    if d_model % 4 or d_model < 8:
        raise ValueError(f"d_model={d_model}, expected a multiple of 4, at least 8, with position='sincos'")
    omega = 10_000.0 ** -(np.arange(d_model // 4) / (d_model // 4 - 1))
    row, column = (position.reshape(-1, 1) * omega for position in np.indices(grid))
    return jnp.asarray(np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1), jnp.float32)


def resize_positions(
    table: Float[Array, "l d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "m d"]:
    """Learned positions of one grid read off at another by bicubic interpolation.

    Args:
      table: a vector for each place of the grid, row by row.
      grid: its rows and columns.
      new_grid: those wanted.

    Source: `interpolate_pos_encoding` in transformers' modeling_vit.py (torch's bicubic: a = -0.75, centres aligned,
      edges repeated, no smoothing where the grid shrinks).
    """
    if grid == new_grid:
        return table
    rows, columns = (_cubic(old, new) for old, new in zip(grid, new_grid, strict=True))
    wide = table.astype(jnp.promote_types(table.dtype, jnp.float32)).reshape(*grid, -1)
    factors = rows.astype(wide.dtype), columns.astype(wide.dtype), wide
    y = jnp.einsum("ar,bs,rsd->abd", *factors, precision="highest")
    return y.reshape(new_grid[0] * new_grid[1], -1).astype(table.dtype)


def _cubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """The weights of `old` points in each of `new` between them."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for k in range(-1, 3):
        t = np.abs(at - (first + k))
        near = ((a + 2) * t - (a + 3)) * t**2 + 1
        far = a * (((t - 5) * t + 8) * t - 4)
        np.add.at(weights, (np.arange(new), np.clip(first + k, 0, old - 1)), np.where(t <= 1, near, far))
    return weights
