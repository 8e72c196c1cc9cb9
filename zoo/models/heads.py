"""A trained model under another head, or over longer inputs.

tagger = zoo.with_head(masked_lm, zoo.TokenClassifierConfig, n_labels=9, rngs=nnx.Rngs(0))
flowers = zoo.with_head(image_classifier, zoo.ImageClassifierConfig, n_classes=102, rngs=nnx.Rngs(0))
longer = zoo.extend_positions(masked_lm, 8192)
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from zoo.layers.names import unknown_name
from zoo.layers.rngs import Seed
from zoo.models.build import MODELS, Model, abstract
from zoo.models.encoder import EncoderConfig
from zoo.models.encoder_heads import EncoderModel, MaskedLM, SequenceClassifierConfig
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.stack.backbone_config import mixer_needs
from zoo.stack.pattern import mixer_name, pattern_mixers, word_options

HeadConfig = EncoderConfig | ImageClassifierConfig


def with_head(model: Model, config: type[HeadConfig] | HeadConfig, *, rngs: Seed, **fields: Any) -> Model:
    """A model of another kind, or with another head of the same kind, around a trained encoder.

    The encoder's parameters are the given model's own arrays, shared and not copied. The head is fresh, except that a
    `MaskedLM` keeps its own from one to another (a decoder for training too, unless the fields say another), and so
    does what pools a row from one `SequenceClassifier` to another with the same `pool`, and the classifiers of an
    `ImageClassifier` for as many classes.

        zoo.with_head(masked_lm, zoo.SequenceClassifierConfig, n_labels=3, pool="mean", rngs=nnx.Rngs(0))

    Args:
      model: a `MaskedLM`, `SequenceClassifier` or `TokenClassifier`; or an `ImageClassifier`.
      config: the kind that is wanted, `MaskedLMConfig`, `SequenceClassifierConfig` or `TokenClassifierConfig`, its
        encoder that of the model; of images, `ImageClassifierConfig`; or a whole config.
      rngs: source of keys for the head, stream "params".
      **fields: fields of that config to set: those of the head, and those of the encoder that leave the shapes of its
        parameters alone (dropout, dtype, mask_padding, remat, ...).

    Raises:
      ValueError: a model without an encoder, an unknown field (naming the nearest), or a config whose encoder has other
        parameters than the model's: names the first.

    Examples:
      >>> model = zoo.create("m2-bert-80m", rngs=0, d_model=16, n_layers=1, vocab_size=32)
      >>> tagger = zoo.with_head(model, zoo.TokenClassifierConfig, n_labels=9, rngs=nnx.Rngs(0))
      >>> tagger(jnp.ones((2, 5), jnp.int32)).shape
      (2, 5, 9)
    """
    if not isinstance(model, EncoderModel | ImageClassifier):
        raise ValueError(f"model is a {type(model).__name__}, expected one with an encoder")
    kind = config if isinstance(config, type) else type(config)
    base: type = ImageClassifierConfig if isinstance(model, ImageClassifier) else EncoderConfig
    encoders = {k.__name__: k for k in MODELS if issubclass(k, base)}
    if kind not in encoders.values():
        raise ValueError(unknown_name("config of a model with an encoder", kind.__name__, encoders))
    known = {field.name for field in dataclasses.fields(kind)}
    for name in fields.keys() - known:
        raise ValueError(unknown_name(f"field of {kind.__name__}", name, known))
    if isinstance(config, type):
        shared: Iterable[Any] = dataclasses.fields(kind if isinstance(model.config, kind) else EncoderConfig)
        config = kind(**{field.name: getattr(model.config, field.name) for field in shared} | fields)
    else:
        config = dataclasses.replace(config, **fields)

    new: Any = MODELS[kind](config, rngs=rngs)
    if isinstance(new, MaskedLM) and isinstance(model, MaskedLM):
        theirs = (model.config.decoder_layers, model.config.decoder_pattern)
        same = theirs == (new.config.decoder_layers, new.config.decoder_pattern)
        _take_over(new, model, fresh=() if same else ("decoder",))
        return new
    if isinstance(model, ImageClassifier):
        heads = {"classifier", "distillation_classifier"} if new.config.n_classes != model.config.n_classes else set()
        _take_over(new, model, fresh=heads)
        return new
    kept = ["encoder"]
    if isinstance(config, SequenceClassifierConfig) and config.pool == getattr(model.config, "pool", None):
        kept += [name for name in ("attention_pool", "pooler") if getattr(new, name) and getattr(model, name)]
    for part in kept:
        _take_over(getattr(new, part), getattr(model, part))
    return new


def _take_over(new: nnx.Module, old: nnx.Module, fresh: Collection[str] = ()) -> None:
    """Gives a module the parameters of another, whose shapes must be the same, in its own dtypes.

    Args:
      fresh: parts that stay as they are.
    """
    theirs, ours = (
        {path: value for path, value in nnx.to_flat_state(nnx.state(module)) if path[0] not in fresh}
        for module in (old, new)
    )
    for path in sorted({*theirs, *ours}, key=str):
        a, b = (None if path not in state else state[path].shape for state in (ours, theirs))
        if a != b:
            name = ".".join(map(str, path))
            longer = path[-1] == "z" or "position_embeddings" in path
            hint = "; `extend_positions` makes inputs longer" if longer else ""
            raise ValueError(
                f"the config's encoder has other parameters than the model's: {name} is {a}, expected {b}{hint}"
            )
    cast = [(path, value.replace(theirs[path][...].astype(value.dtype))) for path, value in ours.items()]
    nnx.update(new, nnx.from_flat_state(cast))


def extend_positions(model: Model, max_len: int) -> Model:
    """A model for longer inputs, to be trained on: what it knows of positions is repeated end to end, and cut.

    That is how the M2-BERT of 32k positions was started from that of 8k: the table of positions and the features `z` of
    each long filter are tiled. All else is shared with the model that is given. On inputs of the old length attention
    computes what it did. A Monarch Mixer does not: its filters decay over `m2.l_max` positions, so they now decay more
    slowly. Models whose positions are not learned (RoPE, ALiBi, state spaces) take inputs of any length as they are.

    Of an `ImageClassifier` only an m2 along positions in a row (conv="flat") needs this: its table of positions is
    interpolated at each size, and an m2 along rows and columns (conv="2d") has a tap at any lag. In a row, a lag that
    was one row down in an image of the old width is another place in a wider one, so such a model is to be trained on.

    Args:
      model: any model.
      max_len: the longest input, at least the present one; of images, the number of their patches and class tokens. It
        becomes `max_len` where there is a table of positions, and `m2.l_max` where the pattern has a flat m2.

    Raises:
      ValueError: max_len is less than the model has, the pattern itself says l_max, or an m2 of conv="2d" beside a flat
        one does not: its filters would change with m2.l_max.

    Examples:
      >>> model = zoo.create("m2-bert-80m", rngs=0, d_model=16, n_layers=1, vocab_size=32)
      >>> zoo.extend_positions(model, 256).config.max_len
      256

    Source: `expand_8k_model_to_32k` in bert/ of HazyResearch/m2.
    """
    config: Any = model.config
    changes: dict[str, Any] = {}
    if getattr(config, "max_len", None) is not None:
        changes["max_len"] = max_len
    mixers = {mixer for mixer in pattern_mixers(config.pattern, config.n_layers) if mixer_name(mixer) == "m2"}
    flat = {mixer for mixer in mixers if "grid" not in mixer_needs(config, mixer)}
    if flat:
        if any("l_max" in word_options(mixer) for mixer in flat):
            raise ValueError(f"pattern={config.pattern!r} says l_max itself, expected it in m2.l_max")
        for word in mixers - flat:
            if "l_max" not in word_options(word):
                raise ValueError(f"pattern={config.pattern!r}: {word} beside a flat m2, expected its own l_max")
        changes["m2"] = dataclasses.replace(config.m2, l_max=max_len)
    for name, old in (("max_len", getattr(config, "max_len", None)), ("m2.l_max", flat and config.m2.l_max)):
        if old and max_len < old:
            raise ValueError(f"max_len={max_len}, expected at least the model's {name}={old}")
    new = abstract(dataclasses.replace(config, **changes))
    theirs = dict(nnx.to_flat_state(nnx.state(model)))

    def fill(path, wanted):
        old = theirs[path][...]
        if old.shape == wanted.shape:
            return wanted.replace(old)
        return wanted.replace(jnp.tile(old, (-(-max_len // len(old)), 1))[:max_len])

    nnx.update(new, nnx.from_flat_state([(p, fill(p, v)) for p, v in nnx.to_flat_state(nnx.state(new))]))
    return new
