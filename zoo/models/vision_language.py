"""Vision-language models: an image encoder, a connector, and a causal language model of any pattern.

model = zoo.VisionLanguageModel(zoo.VisionLanguageConfig(vision=..., text=..., image_token_id=5), rngs=nnx.Rngs(0))
ids = model.with_places([1, 5, 7, 8])                    each image token as often as an image has tokens
logits = model(jnp.array([ids]), images=images)          images: b i x y c, i of them a row, normalised
tokens = zoo.generate(model, [ids], images=images)

A row says where its images are by `image_token_id`: the first places of a row are the tokens of its first image, and so
on, wherever in the row they stand. Without images it is the language model alone.

Axes: i images a row, x image height, y image width, c channels (here alone), m tokens of an image.
"""

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import is_known
from zoo.layers.connectors import Connector, ConnectorConfig
from zoo.layers.depth_router import Skippable
from zoo.layers.rngs import Seed, as_rngs
from zoo.layers.seen import LOOKS_AHEAD, SEEN_AHEAD
from zoo.models.called_like import called_like
from zoo.models.causal import CausalLM, CausalLMConfig
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.stack.backbone import Backbone
from zoo.stack.backbone_config import mixer_needs
from zoo.stack.option_values import settle
from zoo.stack.pattern import mixer_name, pattern_mixers


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """An image encoder, a connector and a causal language model.

    Examples:
      >>> config = zoo.VisionLanguageConfig(
      ...     vision=zoo.ImageClassifierConfig(
      ...         d_model=16, n_layers=1, pattern="vim", image_size=16, patch_size=8, channels=1, n_classes=0
      ...     ),
      ...     text=zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba"),
      ... )
      >>> config.image_tokens  # places that an image takes in a row
      4
    """

    vision: ImageClassifierConfig = ImageClassifierConfig(n_classes=0)
    """The image encoder: a classifier's body, without classes."""
    text: CausalLMConfig = CausalLMConfig()
    """The language model."""
    connector: ConnectorConfig = ConnectorConfig()
    """What makes tokens of the language model of patches."""
    image_token_id: int = 0
    """The token that stands in a row wherever a token of an image goes."""
    vision_layer: int | tuple[int, ...] = -1
    """Whose vectors of the image encoder are read, as `hidden_states` counts: -1 is its output, -2 what enters its last
    block (LLaVA). Of several the connector reads a patch's vectors end to end."""
    vision_norm: bool = True
    """Whether the encoder's output is behind its final normalisation. False: as its last block gives it, the last layer
    of some LLaVAs on SigLIP."""
    class_tokens: bool = False
    """Whether the encoder's tokens that stand for the whole image take places too, where it has them among the patches
    (LLaVA's vision_feature_select_strategy "full" on CLIP)."""
    image_multiplier: float = 1.0
    """Multiplies the tokens of images, as `text.embedding_multiplier` does those of text (LLaVA around Granite)."""
    deepstack: int = 1
    """Side of the squares of tokens of which one alone takes a place in the row; the others are added at that place
    before deeper blocks, one each (DeepStack). 2: a quarter of the length."""
    mutual_attention: bool = False
    """Whether places of images see the question that stands behind them (AKI). For attention alone."""
    full_rows: bool = False
    """Whether every row has as many images as are given. In a text model some of whose blocks have a capacity, such as
    "attn/mlp:cosine", which choose among the places of images alone (p-MoD), a compiled program then leaves out what
    they leave out; rows with fewer images become NaN."""

    def __post_init__(self):
        settle(self)
        if self.vision.n_classes:
            raise ValueError(f"vision.n_classes={self.vision.n_classes}, expected 0: nothing reads the classes")
        if not 0 <= self.image_token_id < max(1, self.text.vocab_size):
            raise ValueError(f"image_token_id={self.image_token_id}, expected a token of {self.text.vocab_size}")
        there = range(-self.vision.n_layers - 1, self.vision.n_layers + 1)
        known = [n for n in self.vision_layers if isinstance(n, Integral) and not isinstance(n, bool) and n in there]
        if not known or len(known) < len(self.vision_layers):
            which = "some" if isinstance(self.vision_layer, tuple) else "one"
            raise ValueError(f"vision_layer={self.vision_layer}, expected {which} of {self.vision.n_layers} layers")
        if not self.vision_norm and not self.reads_output:
            raise ValueError(f"vision_norm=False with vision_layer={self.vision_layer}, expected -1, its output")
        if not self.vision_norm and self.vision.keep is not None:
            raise ValueError(f"vision_norm=False with vision.keep={self.vision.keep}, expected None")
        connector = self.connector
        if self.class_tokens and (connector.kind in ("scan", "queries") or connector.shuffle > 1 or self.deepstack > 1):
            raise ValueError(
                f"class_tokens=True with deepstack={self.deepstack}, connector.kind={connector.kind!r} and "
                f"connector.shuffle={connector.shuffle}, expected 1, a kind that reads each token alone, and 1: they "
                "have no place in rows and columns"
            )
        if self.deepstack < 1 or self.deepstack**2 > self.text.n_layers:
            raise ValueError(
                f"deepstack={self.deepstack}, expected at least 1, and {self.deepstack**2} groups of tokens at most "
                f"text.n_layers={self.text.n_layers}: a block for each"
            )
        for mixer in pattern_mixers(self.text.pattern, self.text.n_layers) if self.mutual_attention else ():
            if "ahead" not in mixer_needs(self.text, mixer):
                raise ValueError(
                    f"mutual_attention=True with {mixer_name(mixer)}, which reads from left to right: an image's state "
                    "holds nothing of the question behind it; expected text.pattern of attention alone"
                )
        self.grid(self.vision.grid)

    def grid(self, patches: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the places that an image of so many patches takes in a row of text."""
        rows, columns = self.connector.grid(patches)
        if self.class_tokens:
            return 1, rows * columns + self.vision.n_tokens
        if rows % self.deepstack or columns % self.deepstack:
            raise ValueError(f"deepstack={self.deepstack} must divide both sides of the {rows} x {columns} tokens")
        return rows // self.deepstack, columns // self.deepstack

    @property
    def image_tokens(self) -> int:
        """Places that an image of `vision.image_size` takes in a row."""
        rows, columns = self.grid(self.vision.grid)
        return rows * columns

    @property
    def vision_layers(self) -> tuple[int, ...]:
        """`vision_layer`, one or several."""
        return self.vision_layer if isinstance(self.vision_layer, tuple) else (self.vision_layer,)

    @property
    def reads_output(self) -> bool:
        """Whether the image encoder's output is among what is read."""
        return any(number in (-1, self.vision.n_layers) for number in self.vision_layers)

    # What a language model's config is asked for.
    @property
    def d_model(self) -> int:
        """Width of the language model."""
        return self.text.d_model

    @property
    def n_layers(self) -> int:
        """Blocks of the language model."""
        return self.text.n_layers

    @property
    def pattern(self) -> str:
        """Mixers of the language model."""
        return self.text.pattern

    @property
    def dtype(self) -> str:
        """Dtype of the heavy computation in the language model."""
        return self.text.dtype

    @property
    def param_dtype(self) -> str:
        """Dtype that the language model's parameters are kept in."""
        return self.text.param_dtype

    @property
    def vocab_size(self) -> int:
        """Tokens that mean something."""
        return self.text.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Columns of the logits."""
        return self.text.padded_vocab_size


class VisionLanguageModel(nnx.Module):
    """Reads rows of text with images in them, and predicts each token from all that came before.

    With `deepstack` and `mutual_attention` off, an image is tokens like others: a language model of state spaces
    carries the same state after a picture as after any prompt, and a token costs the same after it.

    Args:
      config: shape and options.
      rngs: source of keys, stream "params", or a seed.
      vision: an image encoder to take as it is, of config.vision; its arrays are shared. None: a fresh one.
      language: likewise a language model, of config.text.

    Raises:
      ValueError: a given part of another shape than the config says.

    Examples:
      >>> config = zoo.VisionLanguageConfig(
      ...     vision=zoo.ImageClassifierConfig(
      ...         d_model=16, n_layers=1, pattern="vim", image_size=16, patch_size=8, channels=1, n_classes=0
      ...     ),
      ...     text=zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba"),
      ... )
      >>> model = zoo.VisionLanguageModel(config, rngs=0)
      >>> ids = jnp.array([[5, 0, 0, 0, 0, 7]])  # an image stands where token 0 does
      >>> model(ids, images=jnp.ones((1, 1, 16, 16, 1))).shape
      (1, 6, 32)

    Source: Liu et al. 2023, arXiv:2304.08485 (LLaVA); on Mamba: Zhao et al. 2024, arXiv:2403.14520 (Cobra), Huang & Hu
      2024, arXiv:2407.19832 (ML-Mamba); Meng et al. 2024, arXiv:2406.04334 (DeepStack); mutual attention: Wang et al.
      2025, arXiv:2503.02597 (AKI); blocks that some tokens of an image go through: Zhang et al. 2024, arXiv:2412.04449
      (p-MoD).
    """

    def __init__(
        self,
        config: VisionLanguageConfig,
        *,
        rngs: Seed,
        vision: ImageClassifier | None = None,
        language: CausalLM | None = None,
    ):
        self.config, rngs = config, as_rngs(rngs)
        for name, part, expected in (("vision", vision, config.vision), ("language", language, config.text)):
            if part is not None and part.config != expected:
                raise ValueError(f"{name} has another config than the model's: {part.config}, expected {expected}")
        self.vision = ImageClassifier(config.vision, rngs=rngs) if vision is None else vision
        self.connector = Connector(
            config.vision.d_model * len(config.vision_layers),
            config.text.d_model,
            config.connector,
            dtype=jnp.dtype(config.text.dtype),
            param_dtype=jnp.dtype(config.text.param_dtype),
            rngs=rngs,
        )
        self.language = CausalLM(config.text, rngs=rngs) if language is None else language

    @classmethod
    def of(cls, vision: ImageClassifier, language: CausalLM, *, rngs: Seed, **fields: Any) -> "VisionLanguageModel":
        """A model around two trained ones, with a fresh connector. Their arrays are shared.

        Args:
          vision: an image classifier; its classes are left out.
          language: a causal language model, which has `image_token_id` in its vocabulary.
          rngs: source of keys, stream "params", or a seed.
          **fields: of `VisionLanguageConfig`, such as connector and image_token_id.
        """
        body = dataclasses.replace(vision.config, n_classes=0)
        if vision.config.n_classes:
            graphdef, state = nnx.split(vision)
            vision = nnx.merge(graphdef, state)  # the caller's keeps its classes
            vision.config, vision.classifier, vision.distillation_classifier = body, None, None
        config = VisionLanguageConfig(vision=body, text=language.config, **fields)
        return cls(config, rngs=rngs, vision=vision, language=language)

    def around(self, language: CausalLM) -> "VisionLanguageModel":
        """This model with another language model of the same width inside; the arrays of all else are shared."""
        graphdef, state = nnx.split(self)
        # Variables of its own: both models may be parts of one, which has each but once.
        new = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))
        new.config, new.language = dataclasses.replace(self.config, text=language.config), language
        return new

    @property
    def backbone(self) -> Backbone:
        """The language model's stack of blocks."""
        return self.language.backbone

    def with_places(self, ids: Sequence[int], image_size: tuple[int, int] | None = None) -> list[int]:
        """A row of text in which each image token stands once, with as many of them as an image has tokens.

        Args:
          ids: one row.
          image_size: height and width of the images in pixels. None: those that the encoder was made for.
        """
        size = self.config.vision.image_size
        tokens, image = self.places_of_image(*image_size or (size, size)), self.config.image_token_id
        return [int(t) for token in ids for t in [token] * (tokens if token == image else 1)]

    def places_of_image(self, height: int, width: int) -> int:
        """Places that an image of so many pixels takes in a row.

        Raises:
          ValueError: patches do not cover such images, or the connector not such patches.
        """
        rows, columns = self.config.grid(self.config.vision.grid_of(height, width))
        return rows * columns

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        images: Float[Array, "b i x y c"] | None = None,
        prompt_mask: Bool[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l v"]:
        """Logits of the next token at every position, in at least float32.

        Args:
          ids: token ids; `image_token_id` where a token of an image goes.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          images: of each row in order, normalised as the encoder was trained. A row with fewer has anything in place of
            the others: what no place stands for is left out exactly. None: text alone.
          prompt_mask: True where text is given and not to be predicted: with `mutual_attention` images see it, and it
            alone, wherever it stands.
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Raises:
          ValueError: ids as in `CausalLM`; places that no number of whole images has, or more than there are images
            (under `jax.jit` they give NaN); with mutual_attention, images without prompt_mask.
        """
        options: dict[str, Any] = {"images": images, "prompt_mask": prompt_mask, "rngs": rngs}
        return self.head(self.run(ids, mask, segment_ids, **options)[0])

    @called_like(__call__)
    def hidden(self, *inputs, **options) -> Float[Array, "b l d"]:
        """The language model's output at every position, after its final normalisation."""
        return self.run(*inputs, **options)[0]

    def run(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        images: Float[Array, "b i x y c"] | None = None,
        prompt_mask: Bool[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `hidden`, and what training adds to its loss: that of mixtures of experts, 0 without any."""
        vectors, loss = self.inputs(ids, mask, images=images, prompt_mask=prompt_mask, rngs=rngs)
        hidden, more = self.language.run(None, mask, segment_ids, rngs=rngs, **vectors)
        return hidden, loss + more

    @called_like(__call__)
    def hidden_states(self, ids, mask=None, segment_ids=None, *, images=None, prompt_mask=None, rngs=None) -> tuple:
        """The vectors of every layer of the language model; see `Backbone.hidden_states`."""
        vectors, _ = self.inputs(ids, mask, images=images, prompt_mask=prompt_mask, rngs=rngs)
        return self.language.hidden_states(None, mask, segment_ids, rngs=rngs, **vectors)

    def head(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits from the language model's output."""
        return self.language.head(hidden)

    def init_state(self, batch_size: int, max_len: int | None = None) -> tuple:
        """The state before the first token; see `CausalLM.init_state`. Places of images are tokens, too."""
        return self.language.init_state(batch_size, max_len)

    def extend(
        self,
        ids: Int[Array, "b l"],
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        images: Float[Array, "b i x y c"] | None = None,
        prompt_mask: Bool[Array, "b l"] | None = None,
        last_only: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b _ v"], tuple]:
        """Logits for l more tokens, going on from `state`; any split between images gives the same as the whole.

        Args:
          ids, mask, segment_ids, last_only: as in `CausalLM.extend`.
          images: those whose places are among these tokens.
          prompt_mask: as in `__call__`. None: all of these tokens are given, as a prompt's are.
          rngs: as in `__call__`.
        """
        if prompt_mask is None:
            prompt_mask = jnp.ones(ids.shape, bool)
        vectors, _ = self.inputs(ids, mask, images=images, prompt_mask=prompt_mask, rngs=rngs)
        options: dict[str, Any] = {"segment_ids": segment_ids, "last_only": last_only, "rngs": rngs}
        return self.language.extend(None, state, mask=mask, **options, **vectors)

    def encode(
        self, images: Float[Array, "n x y c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "g n m d"], Float[Array, ""]]:
        """The tokens of images in g groups, and what training adds to its loss for the encoder's mixtures of experts.

        The first group takes places in the row, each further one is added there before a deeper block.
        """
        config = self.config
        grid = config.vision.grid_of(images.shape[1], images.shape[2])
        which: dict[str, Any] = {"layer": config.vision_layer, "normed": config.vision_norm}
        patches, loss = self.vision.patch_vectors(images, class_tokens=config.class_tokens, rngs=rngs, **which)
        tokens, multiplier = self.connector(patches, grid), config.image_multiplier
        tokens = tokens if multiplier == 1 else tokens * multiplier
        side, (rows, columns) = config.deepstack, config.grid(grid)
        return rearrange(tokens, "n (r s c t) d -> (s t) n (r c) d", r=rows, s=side, c=columns, t=side), loss

    def inputs(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        images: Float[Array, "b i x y c"] | None = None,
        prompt_mask: Bool[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[dict[str, Any], Float[Array, ""]]:
        """What the language model is called with in place of ids, and the loss that the encoder adds.

        The first is `inputs_embeds`, and with `deepstack`, `mutual_attention` or blocks of a capacity `layer_inputs`,
        `ahead` or `skippable`; the arguments are those of `__call__`.
        """
        config = self.config
        places = ids == config.image_token_id
        if mask is not None:
            places &= mask
        self.check_places(places, images)
        # A row's own text, checked as the language model's ids are.
        x = self.language.vectors(ids)
        if images is None:
            return {"inputs_embeds": x} | self._skippable(places, 0), jnp.float32(0)
        b, each = images.shape[:2]
        n = self.places_of_image(*images.shape[2:4])
        count = jnp.sum(places, axis=1)
        used = jnp.arange(each)[None] * n < count[:, None]
        images = jnp.where(used[..., None, None, None], images, 0)  # what no place stands for, NaN included
        groups, loss = self.encode(rearrange(images, "b i x y c -> (b i) x y c"), rngs=rngs)
        groups = rearrange(groups, "g (b i) m d -> g b (i m) d", b=b).astype(x.dtype)
        whole = (count % n == 0) & (count <= each * n) & (not config.full_rows or count == each * n)
        index = jnp.maximum(jnp.cumsum(places, axis=1) - 1, 0)
        index = jnp.where(whole[:, None], index, groups.shape[2])  # beyond all of them: NaN
        visual = jnp.take_along_axis(groups, index[None, :, :, None], axis=2, mode="fill")
        here = places[..., None]
        vectors: dict[str, Any] = {"inputs_embeds": jnp.where(here, visual[0], x)}
        if config.deepstack > 1:
            vectors["layer_inputs"] = {g: jnp.where(here, visual[g], 0) for g in range(1, len(groups))}
        if config.mutual_attention:
            if prompt_mask is None:
                raise ValueError("mutual_attention=True without prompt_mask: images would see the answers that follow")
            vectors["ahead"] = jnp.where(places, LOOKS_AHEAD, jnp.where(prompt_mask, SEEN_AHEAD, 0))
        return vectors | self._skippable(places, each * n if config.full_rows else 0), loss

    def _skippable(self, places, at_least):
        """What blocks with a capacity choose among: the places of images, of which each row has at least so many."""
        if all(word.capacity is None for word in self.backbone.words):
            return {}
        if is_known(places):
            at_least = int(np.asarray(places).sum(axis=1).min(initial=places.shape[1]))
        return {"skippable": Skippable(places, at_least)}

    def check_places(self, places: Any, images: Any) -> None:
        """Raises a ValueError where the images of some rows do not fill their places, as far as these are known.

        Args:
          places: (b, l) whether a token of an image goes there.
          images: (b, i, x, y, c), or None.
        """
        if not is_known(places):
            return
        counts = np.asarray(places).sum(axis=1)
        if images is None:
            if counts.any():
                raise ValueError(f"ids has {counts.max()} places of images in a row, and there are no images")
            return
        each, n = images.shape[1], self.places_of_image(*images.shape[2:4])
        if images.shape[0] != len(counts):
            raise ValueError(f"images are of {images.shape[0]} rows, expected those of ids, {len(counts)}")
        for row, count in enumerate(counts):
            if count % n or count > each * n:
                raise ValueError(
                    f"row {row} has {count} places of images, expected {n} for each of at most {each}: `with_places` "
                    "puts them there"
                )
