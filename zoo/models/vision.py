"""Image classifiers: patches are tokens, and any mixer stands between them.

model = zoo.ImageClassifier(zoo.ImageClassifierConfig(pattern="attn/mlp", n_classes=10), rngs=nnx.Rngs(0))
logits = model(images)                                              # images: b x y c, normalised

Axes: x image height, y image width, c channels (here alone).
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ssm.sequence_cut import lay_whole
from zoo.layers.attention import AttentionConfig
from zoo.layers.depth_router import Skippable
from zoo.layers.image_tokens import PatchEmbedding, Stem, grid_of, resize_positions, sincos_positions
from zoo.layers.linear import linear
from zoo.layers.mlp import MLPConfig
from zoo.layers.rngs import Seed, as_rngs
from zoo.stack.backbone import Backbone
from zoo.stack.backbone_config import BackboneConfig, mixer_needs, word_config
from zoo.stack.block import make_norm
from zoo.stack.pattern import mixer_name, pattern_mixers

ClassToken = Literal["none", "first", "middle"]
Position = Literal["learned", "sincos", "none"]
Distillation = Literal["none", "token", "classifier"]


@dataclasses.dataclass(frozen=True)
class ImageClassifierConfig(BackboneConfig):
    """Patches, their positions, a backbone that looks both ways, and classes. The defaults are ViT's.

    Examples:
      >>> zoo.ImageClassifierConfig(n_classes=10).patch_size
      16
    """

    pattern: str = "attn/mlp"
    """Mixers of the blocks, e.g. "attn/mlp", "m2/monarch", "mamba"; cycles to n_layers."""
    causal: bool = False
    """Whether patches see only themselves and those before, row by row."""
    norm: Literal["rms", "layer"] = "layer"
    """Normalisation around each mixer and at the end."""
    norm_eps: float = 1e-6
    """Added to the variance in normalisation."""
    attn: AttentionConfig = AttentionConfig(position="none", bias=True)
    """Options of "attn"."""
    mlp: MLPConfig = MLPConfig(gated=False, activation="gelu", bias=True)
    """Options of "mlp"."""
    n_classes: int = 1000
    """Classes. 0: no head, for `features` alone."""
    image_size: int = 224
    """Pixels to a side of the images that learned positions are for. Others fit too: positions are interpolated."""
    patch_size: int = 16
    """Pixels to a side of a patch."""
    patch_stride: int | None = None
    """Pixels from one patch to the next. None: patch_size, so that they do not overlap."""
    crop_to_patches: bool = False
    """Whether the last pixels right and below, where no whole patch fits, are left out: 384 pixels in patches of 14
    (SigLIP). False: such images are refused."""
    channels: int = 3
    """Channels of an image."""
    stem: Stem = "patch"
    """patch: one convolution. conv: 3x3 convolutions of stride 2, one for each halving of a patch."""
    position: Position = "learned"
    """Positions: learned, sines and cosines of row and column, or none (the mixer tells places apart itself)."""
    class_token: ClassToken = "first"
    """Where a learned token that stands for the image is: before the patches, in their middle, or nowhere."""
    distillation: Distillation = "none"
    """DeiT's second token behind the class token: none, there but not read at the end, or with a classifier of its own,
    whose logits are averaged with the first one's."""
    pool: Literal["token", "mean"] = "token"
    """An image's vector: the class token's, or the mean of the patches'."""
    embedding_norm: bool = False
    """Whether a norm comes behind the embeddings, before the first block (CLIP)."""
    patch_bias: bool = True
    """Whether the map of patches to vectors has a bias."""
    embedding_dropout: float = 0.0
    """Share of the embeddings that is dropped in training."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.n_classes < 0:
            raise ValueError(f"n_classes={self.n_classes}, expected at least 0")
        if self.patch_stride is not None and self.patch_stride < 1:
            raise ValueError(f"patch_stride={self.patch_stride}, expected None or at least 1")
        for name, kind in (
            ("stem", Stem),
            ("position", Position),
            ("class_token", ClassToken),
            ("distillation", Distillation),
        ):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {known}")
        if self.pool not in ("token", "mean"):
            raise ValueError(f"pool={self.pool!r}, expected 'token' or 'mean'")
        if self.pool == "token" and self.class_token == "none":
            raise ValueError("pool='token' with class_token='none', expected pool='mean'")
        if self.distillation != "none" and (self.class_token != "first" or self.pool != "token"):
            raise ValueError(f"distillation={self.distillation!r}, expected class_token='first' and pool='token'")
        by_rows = sorted(
            mixer for mixer in pattern_mixers(self.pattern, self.n_layers) if "grid" in mixer_needs(self, mixer)
        )
        if by_rows and self.class_token != "none":
            raise ValueError(
                f"pattern={self.pattern!r}: {by_rows[0]} goes by rows and columns, expected class_token='none'"
            )
        if self.stem == "conv":
            if self.patch_size & (self.patch_size - 1) or self.patch_size < 2:
                raise ValueError(f"patch_size={self.patch_size}, expected a power of 2 with stem='conv'")
            if self.stride != self.patch_size:
                raise ValueError(f"patch_stride={self.patch_stride}, expected None with stem='conv'")
            if self.crop_to_patches:
                raise ValueError("crop_to_patches=True, expected False with stem='conv'")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout={self.embedding_dropout}, expected 0 <= embedding_dropout < 1")
        self.grid_of(self.image_size, self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of so many pixels.

        Raises:
          ValueError: patches do not cover it.
        """
        return grid_of(height, width, self.patch_size, self.stride, self.crop_to_patches)

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.patch_stride or self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of image_size."""
        return self.grid_of(self.image_size, self.image_size)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of an image, those that stand for the whole of it included: what the filters of an m2 along
        positions in a row reach over. None: any number."""
        mixers = (mixer for mixer in pattern_mixers(self.pattern, self.n_layers) if mixer_name(mixer) == "m2")
        return min(
            (word_config(self, mixer).l_max for mixer in mixers if "grid" not in mixer_needs(self, mixer)), default=None
        )

    @property
    def n_tokens(self) -> int:
        """Tokens that stand for the whole image: 0, 1, or 2 with DeiT's."""
        return 0 if self.class_token == "none" else 1 + (self.distillation != "none")


class ImageClassifier(nnx.Module):
    """Embeds patches, mixes them, and classifies the image.

    Images of another size than the model was made for are taken as they are, whatever their proportions: learned
    positions are interpolated, and attention, state spaces and an m2 along rows and columns (`m2[conv=2d]`) have no
    longest input. An m2 along positions in a row takes as many tokens as m2.l_max, and more after
    `zoo.extend_positions`. It counts lags along that row, so the lag that was one place down in training is another
    place in an image of another width: it is to be trained on.

    Args:
      config: shape and options.
      rngs: source of keys, stream "params", or a seed.

    Examples:
      >>> config = zoo.ImageClassifierConfig(
      ...     d_model=16, n_layers=1, pattern="vim", image_size=16, patch_size=8, channels=1, n_classes=10
      ... )
      >>> zoo.ImageClassifier(config, rngs=0)(jnp.ones((2, 16, 16, 1))).shape
      (2, 10)

    Source: Dosovitskiy et al. 2020, arXiv:2010.11929; distillation: Touvron et al. 2020, arXiv:2012.12877; class token
      in the middle: Zhu et al. 2024, arXiv:2401.09417.
    """

    def __init__(self, config: ImageClassifierConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.patch_embedding = PatchEmbedding(
            config.d_model,
            patch_size=config.patch_size,
            stride=config.stride,
            channels=config.channels,
            stem=config.stem,
            bias=config.patch_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        rows, columns = config.grid

        def table(n):
            value = jax.nn.initializers.truncated_normal(0.02)(rngs.params(), (n, config.d_model), param_dtype)
            return nnx.Param(value, decay=False, axes=(None, "embed"))

        self.class_token = table(1) if config.n_tokens else None
        self.distillation_token = table(1) if config.n_tokens == 2 else None
        learned = config.position == "learned"
        self.position_embeddings = table(config.n_tokens + rows * columns) if learned else None
        self.embedding_norm = make_norm(config, rngs) if config.embedding_norm else None
        self.dropout = nnx.Dropout(config.embedding_dropout)
        self.backbone = Backbone(config, rngs=rngs)
        options: dict[str, Any] = {"bias": True, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.classifier = linear(config.d_model, config.n_classes, **options) if config.n_classes else None
        second = config.n_classes and config.distillation == "classifier"
        self.distillation_classifier = linear(config.d_model, config.n_classes, **options) if second else None

    def __call__(
        self, images: Float[Array, "b x y c"], *, task: Int[Array, "b"] | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b k"]:
        """Logits of the k classes, in at least float32.

        Args:
          images: pixels, normalised as the model was trained; any size that patches cover, and filters too.
          task: the number of each image's task, where mixtures of experts have a router for each (`MoEConfig.n_tasks`).
          rngs: stream "dropout" switches dropout and stochastic depth on; None leaves them off.

        Raises:
          ValueError: a model without classes; images of another number of channels, that patches do not cover, or of
            more tokens than filters reach over.
        """
        return self.read(self.hidden(images, task=task, rngs=rngs))

    def read(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b k"]:
        """Logits from the backbone's output.

        Raises:
          ValueError: a model without classes.
        """
        if self.classifier is None:
            raise ValueError("n_classes=0: the model has no classifier, expected `features` or `hidden`")
        vectors = self.vectors(hidden)
        if self.distillation_classifier is None:
            return _wide(self.classifier(vectors))
        first, second = jnp.split(vectors, 2, axis=-1)
        return (_wide(self.classifier(first)) + _wide(self.distillation_classifier(second))) / 2

    def features(
        self, images: Float[Array, "b x y c"], *, task: Int[Array, "b"] | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b d"]:
        """One vector an image, as the classifier reads it; those of both tokens, end to end, where both are read."""
        return self.vectors(self.hidden(images, task=task, rngs=rngs))

    def vectors(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b w"]:
        """As `features`, from the backbone's output."""
        at = self._place_of_token(hidden.shape[1] - self.config.n_tokens)
        if self.config.pool == "token":
            read = 2 if self.config.distillation == "classifier" else 1
            return hidden[:, at : at + read].reshape(hidden.shape[0], read * hidden.shape[2])
        return jnp.mean(_without(hidden, at, self.config.n_tokens), axis=1)

    def hidden(
        self, images: Float[Array, "b x y c"], *, task: Int[Array, "b"] | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b l d"]:
        """The backbone's output for every token, those that stand for the whole image included."""
        return self.run(images, task=task, rngs=rngs)[0]

    def run(
        self, images: Float[Array, "b x y c"], *, task: Int[Array, "b"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `hidden`, and what training adds to its loss: that of mixtures of experts, 0 without any."""
        x, given = self._embed(images, rngs)
        return self.backbone.run(x, task=task, rngs=rngs, **given)

    def hidden_states(
        self, images: Float[Array, "b x y c"], *, task: Int[Array, "b"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b l d"], ...]:
        """The tokens' vectors of every layer: n_layers + 1 arrays, the embedding first and `hidden` last.

        See `Backbone.hidden_states` for the convention.
        """
        x, given = self._embed(images, rngs)
        return self.backbone.hidden_states(x, task=task, rngs=rngs, **given)

    def patch_vectors(
        self,
        images: Float[Array, "b x y c"],
        *,
        layer: int | tuple[int, ...] = -1,
        normed: bool = True,
        class_tokens: bool = False,
        task: Int[Array, "b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l w"], Float[Array, ""]]:
        """The patches' vectors of a layer, row by row, and what training adds to its loss for the model's mixers.

        Args:
          images: pixels, as in `__call__`.
          layer: which, as `hidden_states` counts: -1 is the backbone's output. What the others compute on top of an
            earlier one is not computed under `jax.jit`, and adds nothing to the loss. Of several the vectors lie end to
            end, in the order that is given.
          normed: whether the last layer's are behind the final normalisation, which those of the others never are.
          class_tokens: whether those of tokens that stand for the whole image are among them, where these stand.
          task, rngs: as in `__call__`.
        """
        x, given = self._embed(images, rngs)
        layers, last = layer if isinstance(layer, tuple) else (layer,), (-1, self.config.n_layers)
        if {*layers} <= {*last}:
            x, loss = self.backbone.run(x, task=task, normed=normed, rngs=rngs, **given)
            x = jnp.concatenate([x] * len(layers), axis=-1)
        else:
            read = any(number in last for number in layers)
            states, loss = self.backbone.run_states(x, task=task, normed=normed or not read, rngs=rngs, **given)
            x, loss = jnp.concatenate([states[number] for number in layers], axis=-1), loss if read else jnp.float32(0)
        n = 0 if class_tokens else self.config.n_tokens
        return _without(x, self._place_of_token(x.shape[1] - n), n), loss

    def _embed(self, images, rngs):
        """What enters the backbone, and what it is called with: the grid of patches, or which tokens are some."""
        config = self.config
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            found = f"{images.dtype}{images.shape}"
            raise ValueError(f"images are {found}, expected floats (b, x, y, c), normalised as the model was trained")
        if images.shape[-1] != config.channels:
            raise ValueError(f"images have {images.shape[-1]} channels, expected {config.channels} in the last axis")
        grid = config.grid_of(images.shape[1], images.shape[2])
        n_tokens, most = grid[0] * grid[1] + config.n_tokens, config.max_tokens
        if most is not None and n_tokens > most:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: {n_tokens} tokens, expected at most "
                f"m2.l_max={most}; `extend_positions` makes filters longer, and m2[conv=2d] takes any size"
            )
        # Its rows cut over devices, XLA (jaxlib 0.10.1, CPU) makes the gradient of the convolution's kernel 0.
        x = lay_whole(self.patch_embedding(images)).reshape(images.shape[0], grid[0] * grid[1], config.d_model)
        at = self._place_of_token(x.shape[1])
        x, positions = x.astype(jnp.dtype(config.param_dtype)), self._positions(grid, at)
        if config.n_tokens:
            learned = [token[...] for token in (self.class_token, self.distillation_token) if token is not None]
            tokens = [jnp.broadcast_to(token, (x.shape[0], 1, config.d_model)).astype(x.dtype) for token in learned]
            x = jnp.concatenate([x[:, :at], *tokens, x[:, at:]], axis=1)
        if positions is not None:
            x = x + positions.astype(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x).astype(x.dtype)
        if rngs is not None:
            x = self.dropout(x, deterministic=False, rngs=rngs)
        if not config.n_tokens:
            return x, {"grid": grid}
        place = jnp.arange(x.shape[1])[None] - at  # what stands for the whole image goes through every block
        patches = jnp.broadcast_to((place < 0) | (place >= config.n_tokens), x.shape[:2])
        return x, {"skippable": Skippable(patches, x.shape[1] - config.n_tokens)}

    def _place_of_token(self, n_patches):
        """Where the class token is."""
        return n_patches // 2 if self.config.class_token == "middle" else 0

    def _positions(self, grid, at):
        """What is added to the tokens of an image, or None."""
        config, n = self.config, self.config.n_tokens
        if self.position_embeddings is not None:
            table = self.position_embeddings[...]
            if grid == config.grid:
                return table
            there = self._place_of_token(config.grid[0] * config.grid[1])
            patches = resize_positions(_without(table[None], there, n)[0], config.grid, grid)
            return jnp.concatenate([patches[:at], table[there : there + n], patches[at:]])
        if config.position == "sincos":
            patches = sincos_positions(grid, config.d_model)
            return jnp.concatenate([patches[:at], jnp.zeros((n, config.d_model)), patches[at:]])
        return None


def _without(x, at, n):
    """All tokens but the n from `at` on."""
    return jnp.concatenate([x[:, :at], x[:, at + n :]], axis=1) if n else x


def _wide(logits):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
