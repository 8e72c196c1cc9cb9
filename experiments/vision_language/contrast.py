"""Images and texts in one space: two encoders whose vectors are near where a text is an image's own.

    softmax   each image finds its text among those of the batch, and each text its image (CLIP)
    sigmoid   each pair of the batch by itself: the image's own text or another (SigLIP)

The vectors are what the encoders' classifiers say, scaled to length 1: an `ImageClassifier` of d classes and a
`SequenceClassifier` of d labels are a pair of encoders into a space of d dimensions, whatever mixers they have.

Axes: x image height, y image width, c channels (here alone), n texts.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import zoo
from experiments.loop.train import Loss
from experiments.retrieval.losses import in_batch, unit

Kind = Literal["softmax", "sigmoid"]
# Of the scores at the start, and the most that the scale may grow to. Source: CLIP, section 2.5; SigLIP, section 3.2.
_SCALE, _BIAS, _MOST = {"softmax": 1 / 0.07, "sigmoid": 10.0}, {"softmax": 0.0, "sigmoid": -10.0}, 100.0


class Towers(nnx.Module):
    """An encoder of images, one of texts, and how their cosines become scores: scale cos + bias.

    Args:
      images, texts: encoders with as many classes and labels as the space has dimensions.
      loss: what they are trained for.
    """

    def __init__(self, images: zoo.ImageClassifier, texts: zoo.SequenceClassifier, loss: Kind = "softmax"):
        self.images, self.texts = images, texts
        self.log_scale = nnx.Param(jnp.log(jnp.float32(_SCALE[loss])), decay=False, axes=())
        self.bias = nnx.Param(jnp.float32(_BIAS[loss]), decay=False, axes=())

    @property
    def scale(self) -> Float[Array, ""]:
        """What cosines are multiplied by."""
        return jnp.minimum(jnp.exp(self.log_scale[...]), _MOST)

    def of_images(self, images: Float[Array, "b x y c"], *, rngs: nnx.Rngs | None = None):
        """Vectors (b, d) of length 1, and what training adds to its loss for the encoder's mixers."""
        hidden, auxiliary = self.images.run(images, rngs=rngs)
        return unit(self.images.read(hidden)), auxiliary

    def of_texts(self, ids: Int[Array, "b l"], mask: Any, *, rngs: nnx.Rngs | None = None):
        """Vectors (b, d) of length 1, and what training adds to its loss for the encoder's mixers."""
        hidden, auxiliary = self.texts.run(ids, mask, rngs=rngs)
        return unit(self.texts.read(hidden, mask)), auxiliary


def pairwise(
    images: Float[Array, "b d"], texts: Float[Array, "n d"], own: Any, *, scale: Any, bias: Any
) -> Float[Array, "b n"]:
    """SigLIP's loss of each pair: -log sigmoid(y (scale u . v + bias)), y = 1 for the image's own text, else -1.

    Args:
      images, texts: vectors of length 1.
      own: (b, n) whether it is.
      scale, bias: learned numbers.

    Source: Zhai et al. 2023, arXiv:2303.15343, eq. 1 and algorithm 1.
    """
    logits = scale * jnp.einsum("bd,nd->bn", images, texts, precision="highest") + bias
    return -jax.nn.log_sigmoid(jnp.where(own, logits, -logits))


def in_parts(encode: Any, inputs: tuple[Any, ...], rngs: nnx.Rngs | None, mini_batch: int | None):
    """Vectors of rows, mini_batch of them at a time; on the way back each mini-batch is encoded again.

    So a loss that looks at the whole batch has the same value and gradient in the memory of a mini-batch.

    Args:
      encode: encode(*inputs, rngs=) gives (vectors, auxiliary loss).
      inputs: arrays whose first axis is that of the rows.
      rngs: stream "dropout" switches dropout on.
      mini_batch: rows that are encoded at once, a divisor of them. None: all.

    Source: gradient caching (Gao et al. 2021, arXiv:2101.06983), here as `jax.checkpoint` inside `jax.lax.map`.
    """
    n = len(inputs[0])
    if mini_batch is None or mini_batch >= n:
        return encode(*inputs, rngs=rngs)
    parts = n // mini_batch
    keys = None if rngs is None else jax.random.split(rngs.dropout(), parts)

    # Row m * parts + p goes to part p, so that each keeps its share of rows on every device.
    def part(given):
        rows, key = given
        return encode(*rows, rngs=None if key is None else nnx.Rngs(dropout=key))

    cut = tuple(jnp.moveaxis(x.reshape(mini_batch, parts, *x.shape[1:]), 1, 0) for x in inputs)
    vectors, auxiliary = jax.lax.map(jax.checkpoint(part, prevent_cse=False), (cut, keys))
    return jnp.moveaxis(vectors, 0, 1).reshape(n, -1), jnp.mean(auxiliary)


def contrastive_loss(
    towers: Towers, batch: Mapping[str, Any], rngs: nnx.Rngs | None, *, kind: Kind, mini_batch: int | None = None
) -> Loss:
    """The loss of a batch of images (b, x, y, c), tokens and mask (b, l) of their texts, and text_ids (b), equal where
    texts are: an image whose text another has too is no mistake of it. -1: a row that is none."""
    images, of_images = in_parts(towers.of_images, (batch["images"],), rngs, mini_batch)
    texts, of_texts = in_parts(towers.of_texts, (batch["tokens"], batch["mask"]), rngs, mini_batch)
    ids = batch["text_ids"]
    there = ids >= 0
    if kind == "softmax":
        values = in_batch(
            images,
            texts[:, None],
            ids[:, None],
            ids[:, None],
            scale=towers.scale,  # type: ignore[arg-type]
            symmetric=True,
        )
    else:
        each = pairwise(images, texts, ids[:, None] == ids, scale=towers.scale, bias=towers.bias[...])
        values = jnp.sum(jnp.where(there, each, 0), axis=1)
    total = jnp.sum(jnp.where(there, values, 0))
    adds = any(tower.has_auxiliary_loss for tower in (towers.images.backbone, towers.texts.encoder.backbone))
    auxiliary = (of_images + of_texts) / 2 if adds else None
    return Loss(total, jnp.sum(there).astype(jnp.float32), auxiliary)
