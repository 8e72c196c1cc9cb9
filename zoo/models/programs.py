"""A model as plain functions of arrays, for `jax.export`: what runs where this library is not.

    for name, program in programs(model, max_len=2048).items():
        exported = jax.export.export(jax.jit(program.function), platforms=["cpu", "cuda", "tpu"])(*program.arguments)

Every function takes the model's weights first, a dict of arrays as `weights` gives them, and then arrays for any number
of rows (b) and positions (l). A state is a list of arrays. So whoever loads such a program needs no class from here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx

from zoo.models.build import Model
from zoo.models.causal import CausalLM
from zoo.models.encoder_heads import MaskedLM, SequenceClassifier
from zoo.models.vision import ImageClassifier
from zoo.models.vision_language import VisionLanguageModel
from zoo.stack.backbone_config import word_config
from zoo.stack.pattern import mixer_name, pattern_mixers


class Program(NamedTuple):
    """A function, and the shapes that it takes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Shapes and dtypes of the weights and of what follows them, with symbols for what may be any number."""
    names: tuple[str, ...]
    """What the arguments are."""
    gives: str
    """What comes out, in words."""
    most: int | None = None
    """The most tokens in a row, where there are tokens."""


def weights(model: Model) -> dict[str, jax.Array]:
    """The arrays of a model by their names, "backbone.layers.0.mixer.A_log"."""
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))}


def longest(config: Any) -> int | None:
    """The most tokens in a row of a model of text, None where there is no bound."""
    mixers = {mixer for mixer in pattern_mixers(config.pattern, config.n_layers) if mixer_name(mixer) == "m2"}
    bounds = [word_config(config, mixer).l_max for mixer in mixers]
    return min([*bounds, *([config.max_len] if getattr(config, "max_len", None) else [])], default=None)


def programs(model: Model, *, max_len: int | None = None) -> dict[str, Program]:
    """The functions that a model is, by name.

        a language model     forward(weights, ids, mask) -> logits
                             prompt(weights, ids, mask) -> logits, state      of the last token
                             decode(weights, ids, state) -> logits, state     of one token more in each row
        an encoder           forward(weights, ids, mask) -> logits            hidden -> vectors of tokens
                             or, where it reads whole rows, embed -> vectors of rows
        of images            forward(weights, images) -> logits               features -> vectors of images

    Encoders that know several kinds of tokens take token_type_ids behind the mask. Logits have a column for each token
    of the vocabulary. Prompts stand flush right: padding, where the mask is False, is on their left.

    Args:
      model: any.
      max_len: the most tokens that a row ever holds, prompt and what follows it. None: the most that the model can
        read, or 2,048.

    Raises:
      ValueError: more than the model can read.
    """
    graphdef, state = nnx.split(model)
    variables = nnx.to_flat_state(state)
    taken = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights(model).items()}

    def built(arrays: dict[str, jax.Array]) -> Any:
        filled = [(path, value.replace(arrays[".".join(map(str, path))])) for path, value in variables]
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    if isinstance(model, VisionLanguageModel):
        raise ValueError("a VisionLanguageModel is not exported, expected one of text or of images alone")
    if isinstance(model, ImageClassifier):
        return _of_images(model, built, taken)
    bound = longest(model.config)
    if max_len is not None and bound is not None and max_len > bound:
        raise ValueError(f"max_len={max_len}, expected at most {bound}, the longest row that the model reads")
    most = max_len or bound or 2048
    return (_causal if isinstance(model, CausalLM) else _of_text)(model, built, taken, most)


def _rows(most: int, *more: Any) -> tuple[Any, ...]:
    """Shapes of ids and mask, and of further integers, for any number of rows of at most that many tokens."""
    shape = jax.export.symbolic_shape("b, l", constraints=[f"l <= {most}"])
    kinds = (jnp.int32, jnp.bool_, *more)
    return tuple(jax.ShapeDtypeStruct(shape, kind) for kind in kinds)


def _causal(model, built, taken, most):
    vocab_size, structure = model.config.vocab_size, jax.tree.structure(model.init_state(1, most))

    def forward(arrays, ids, mask):
        return built(arrays)(ids, mask)[..., :vocab_size]

    def prompt(arrays, ids, mask):
        model = built(arrays)
        logits, state = model.extend(ids, model.init_state(ids.shape[0], most), mask=mask, last_only=True)
        return logits[:, 0, :vocab_size], jax.tree.leaves(state)

    def decode(arrays, ids, state):
        logits, state = built(arrays).extend(ids, jax.tree.unflatten(structure, state))
        return logits[:, 0, :vocab_size], jax.tree.leaves(state)

    # Which axis of a state is that of the rows: the one that grows with them.
    one, two = (jax.tree.leaves(jax.eval_shape(lambda n=n: model.init_state(n, most))) for n in (1, 2))
    (b,) = jax.export.symbolic_shape("b")
    state = [
        jax.ShapeDtypeStruct([n if n == m else b for n, m in zip(x.shape, y.shape, strict=True)], x.dtype)
        for x, y in zip(one, two, strict=True)
    ]
    rows, names = _rows(most), ("weights", "ids", "mask")
    token = jax.ShapeDtypeStruct((b, 1), jnp.int32)
    next_token = "logits of the next token, (b, v), and the state"
    return {
        "forward": Program(
            forward, (taken, *rows), names, "logits of the next token at every position, (b, l, v)", most
        ),
        "prompt": Program(prompt, (taken, *rows), names, next_token, most),
        "decode": Program(decode, (taken, token, state), ("weights", "ids", "state"), next_token, most),
    }


def _of_text(model, built, taken, most):
    kinds = model.config.type_vocab_size > 1
    arguments = (taken, *_rows(most, *([jnp.int32] if kinds else [])))
    names = ("weights", "ids", "mask", *(["token_type_ids"] if kinds else []))
    columns = model.config.vocab_size if isinstance(model, MaskedLM) else None

    def options(more):
        return {"token_type_ids": more[0]} if more else {}

    def forward(arrays, ids, mask, *more):
        logits = built(arrays)(ids, mask, **options(more))
        return logits if columns is None else logits[..., :columns]

    def hidden(arrays, ids, mask, *more):
        return built(arrays).hidden(ids, mask, **options(more))

    def embed(arrays, ids, mask, *more):
        return built(arrays).embed(ids, mask, **options(more))

    if not isinstance(model, SequenceClassifier):
        return {
            "forward": Program(forward, arguments, names, "logits at every position, (b, l, classes or tokens)", most),
            "hidden": Program(hidden, arguments, names, "vectors of every position, (b, l, d)", most),
        }
    found = {"embed": Program(embed, arguments, names, "a vector for each row, (b, d)", most)}
    if model.classifier is not None:
        found["forward"] = Program(forward, arguments, names, "logits of each row's classes, (b, classes)", most)
    return found


def _of_images(model, built, taken):
    config = model.config
    (b,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, config.image_size, config.image_size, config.channels), jnp.float32)

    def forward(arrays, images):
        return built(arrays)(images)

    def features(arrays, images):
        return built(arrays).features(images)

    names = ("weights", "images")
    found = {"features": Program(features, (taken, images), names, "a vector for each image, (b, d)")}
    if model.classifier is not None:
        found["forward"] = Program(forward, (taken, images), names, "logits of each image's classes, (b, classes)")
    return found
