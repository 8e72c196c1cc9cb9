"""A model as a table: what it is made of, how large each part is, what it carries, and what a token costs.

zoo.summary(zoo.create("mamba-130m", rngs=0))       # prints, and returns what it prints

part         kind     shape      parameters  dtype    state a row  + a token  FLOPs a token
embedding    Embed    b l 768    38,615,040  float32
layers.0-23  mamba    b l 768     3,771,648  float32      114 KiB        0 B         7.47 M
norm_f       RMSNorm  b l 768           768  float32
head         tied     b l 50280           0                                          77.2 M
total                           129,135,360              2.67 MiB        0 B          257 M
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from zoo.models.causal import CausalLM
from zoo.models.encoder import Encoder
from zoo.models.encoder_heads import MaskedLM, SequenceClassifier
from zoo.models.flops import depth_flops, weights_met
from zoo.models.vision import ImageClassifier
from zoo.models.vision_language import VisionLanguageModel
from zoo.stack.backbone import Backbone
from zoo.stack.pattern import format_pattern

# Positions that states are measured at: their growth is a straight line, up to a window.
_FEW, _MORE, _MANY = 8, 16, 1 << 20
# What comes before and behind what.
_ORDER = (
    *("embedding", "word_embeddings", "token_type_embeddings", "patch_embedding", "class_token", "distillation_token"),
    *(
        "position_embeddings",
        "embedding_norm",
        "encoder",
        "backbone",
        "attention_pool",
        "pooler",
        "dense",
        "norm",
        "bias",
        "head",
    ),
    *("classifier", "distillation_classifier", "lm_head"),
)
_ONCE = ("attention_pool", "pooler", "head", "classifier", "distillation_classifier")  # a row, where it has one vector
# Length of a row where the model has none of its own.
DEFAULT_LENGTH = 1024


class Row(NamedTuple):
    """A part of a model."""

    part: str
    """Its place in the model."""
    kind: str
    """Its class; of a layer its word in the pattern."""
    shape: tuple[str | int, ...]
    """Of what comes out of it: b rows, l positions, channels."""
    parameters: int
    """Numbers in it; 0 where it is another part again."""
    dtype: str
    """Of the parameters, all that there are."""
    state_bytes: int | None
    """What a decoder carries for each row, at any length. None: no state, such as where a model looks both ways."""
    state_bytes_per_token: float
    """What it carries besides for each token that there was: 0 for state spaces."""
    state_tokens: int | None
    """How many tokens that grows over, a window. None: no end, or nothing grows."""
    flops_per_token: float
    """Forward, of a row of `seq_len`; what is done once a row is spread over its tokens."""


class Summary(NamedTuple):
    """A model, part by part.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.summary(model, show=False).parameters == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
      True
    """

    rows: tuple[Row, ...]
    seq_len: int
    """Positions of a row, for what each costs."""
    parameters: int
    """In all, what is shared counted once."""
    state_bytes: int | None
    """In all; None where the model carries no state."""
    state_bytes_per_token: float
    """In all, before any window is full."""
    flops_per_token: float
    """In all."""

    def __str__(self) -> str:
        """The table; equal layers in a row are one line."""
        head = ("part", "kind", "shape", "parameters", "dtype", "state a row", "+ a token", "FLOPs a token")
        lines: list[tuple[str, ...]] = [head]
        for _, several in itertools.groupby(self.rows, key=lambda row: (row.part.rstrip("0123456789"), *row[1:])):
            group = list(several)
            lines.append((_range(group), *_cells(group[0])))
        state = self.state_bytes, self.state_bytes_per_token, None
        lines.append(("total", *_cells(Row("total", "", (), self.parameters, "", *state, self.flops_per_token))))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (0, 1, 2, 4)
        text = []
        for line in lines:
            cells = enumerate(zip(line, widths, strict=True))
            text.append("  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in cells))
        return "\n".join([*map(str.rstrip, text), f"FLOPs: forward, in a row of {self.seq_len:,} positions"])


def summary(model: Any, *, seq_len: int | None = None, show: bool = True) -> Summary:
    """Prints and returns what a model is made of.

    Args:
      model: a `CausalLM`, an encoder with or without a head, an `ImageClassifier`, a `VisionLanguageModel` or a
        `Backbone`, with any mixers.
      seq_len: positions of a row, for what a token of attention costs. None: those the model was made for (max_len, or
        an image's patches), or 1,024. Of a vision-language model a row of its language model; what an image costs is
        said for each of the places that it takes there, and so the total is what such a place costs.
      show: whether to print it.

    Raises:
      ValueError: a model without a backbone.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.summary(model, seq_len=100, show=False).state_bytes_per_token  # it has a state, and no cache that grows
      0.0
    """
    found = next(((path, m) for path, m in nnx.iter_modules(model) if isinstance(m, Backbone)), None)
    if found is None:
        raise ValueError(f"model is a {type(model).__name__}, expected one with a Backbone")
    if isinstance(model, VisionLanguageModel):
        seq_len, rows = seq_len or DEFAULT_LENGTH, _of_both(model, seq_len or DEFAULT_LENGTH)
    else:
        seq_len = seq_len or _length(model)
        rows = list(_parts(model, "", found[1], seq_len, model))
    states = [row.state_bytes for row in rows if row.state_bytes is not None]
    made = Summary(
        tuple(rows),
        seq_len,
        sum(row.parameters for row in rows),
        sum(states) if states else None,
        float(sum(row.state_bytes_per_token for row in rows)),
        float(sum(row.flops_per_token for row in rows)),
    )
    if show:
        print(made)
    return made


def _of_both(model: VisionLanguageModel, seq_len: int) -> list[Row]:
    """The rows of an image encoder, a connector and a language model. A token is one of the language model's rows:
    what images cost is spread over those that are theirs."""
    vision, connector, language, patches = model.vision, model.connector, model.language, _length(model.vision)
    share = patches / model.config.image_tokens
    rows = _named("vision", _parts(vision, "", vision.backbone, patches, vision))
    kind, shape, flops = model.config.connector.kind, ("b", "m", model.config.d_model), 2 * weights_met(connector)
    made = Row("connector", kind, shape, *_size(connector), None, 0.0, None, flops)
    rows = [row._replace(flops_per_token=row.flops_per_token * share) for row in (*rows, made)]
    return [*rows, *_named("language", _parts(language, "", language.backbone, seq_len, language))]


def _named(whole: str, rows: Iterator[Row]) -> list[Row]:
    return [row._replace(part=f"{whole}.{row.part}") for row in rows]


def _length(model: Any) -> int:
    if isinstance(model, ImageClassifier):
        rows, columns = model.config.grid
        return rows * columns + model.config.n_tokens
    return getattr(model.config, "max_len", None) or DEFAULT_LENGTH


def _parts(module: Any, prefix: str, backbone: Backbone, seq_len: int, model: Any) -> Iterator[Row]:
    """The rows of a module, in the order in which it names its parts."""
    if module is backbone:
        yield from _layers(backbone, prefix, seq_len)
        return
    for name, part in sorted(vars(module).items(), key=lambda item: _place(module, item[0])):
        if not isinstance(part, nnx.Module | nnx.Param) or (isinstance(part, nnx.Module) and not _size(part)[0]):
            continue
        if isinstance(part, nnx.Module) and any(inner is backbone for _, inner in nnx.iter_modules(part)):
            yield from _parts(part, "" if part is backbone else f"{prefix}{name}.", backbone, seq_len, model)
        else:
            yield _part(part, f"{prefix}{name}", backbone, seq_len, model)
    if module is model and (isinstance(model, MaskedLM) or (isinstance(model, CausalLM) and model.lm_head is None)):
        table = model.embedding if isinstance(model, CausalLM) else model.encoder.word_embeddings
        n, width = table.embedding.shape
        yield Row(f"{prefix}head", "tied", ("b", "l", n), 0, "", None, 0.0, None, 2.0 * n * width)


def _place(module: Any, name: str) -> int:
    """Where a part comes: models that were merged no longer know the order of their parts."""
    if name == "norm" and isinstance(module, Encoder):
        return _ORDER.index("encoder")
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _part(part: Any, name: str, backbone: Backbone, seq_len: int, model: Any) -> Row:
    """What stands before or behind the backbone."""
    size, dtype = _size(part)
    kind = type(part).__name__
    width = getattr(part, "out_features", backbone.config.d_model)
    once = isinstance(model, SequenceClassifier | ImageClassifier) and name in _ONCE
    flops = 2 * weights_met(part) if isinstance(part, nnx.Module) else 0.0
    shape: tuple[str | int, ...] = ("b", width) if once else ("b", "l", width)
    return Row(name, kind, shape, size, dtype, None, 0.0, None, flops / seq_len if once else flops)


def _layers(backbone: Backbone, prefix: str, seq_len: int) -> Iterator[Row]:
    d_model, seen, states = backbone.config.d_model, set(), {}
    for depth, (word, layer) in enumerate(zip(backbone.words, backbone.order, strict=True)):
        size, dtype = _size(backbone.layers[layer])
        name, kind = f"{prefix}layers.{depth}", format_pattern((word,))
        again, flops = layer in seen, depth_flops(backbone, depth, seq_len)
        seen.add(layer)
        if word not in states:
            states[word] = _state(backbone, depth)
        yield Row(name, kind, ("b", "l", d_model), 0 if again else size, dtype, *states[word], flops)
    for name, module in zip(backbone.shared_names, backbone.shared, strict=True):  # counted at the depths that read it
        size, dtype = _size(module)
        shape = ("b", "l", d_model)
        yield Row(f"{prefix}shared.{name}", type(module).__name__, shape, size, dtype, None, 0.0, None, 0.0)
    if backbone.norm_f is not None:
        size, dtype = _size(backbone.norm_f)
        kind = type(backbone.norm_f).__name__
        yield Row(f"{prefix}norm_f", kind, ("b", "l", d_model), size, dtype, None, 0.0, None, 0.0)


def _size(part: Any) -> tuple[int, str]:
    """Parameters, and their dtypes."""
    leaves = [part.get_value()] if isinstance(part, nnx.Param) else jax.tree.leaves(nnx.state(part, nnx.Param))
    return sum(leaf.size for leaf in leaves), ", ".join(sorted({leaf.dtype.name for leaf in leaves}))


def _state(backbone: Backbone, depth: int) -> tuple[int | None, float, int | None]:
    """Bytes at any length, more for each token, and the tokens that these are for at most."""
    graphdef, variables = nnx.split(backbone)

    def size(length: int) -> int | None:
        def begin(variables):
            whole = nnx.merge(graphdef, variables)
            shared = dict(zip(whole.shared_names, whole.shared, strict=True))
            return whole.blocks[depth].init_state(1, length, shared=shared)

        try:
            state = jax.eval_shape(begin, variables)
        except (ValueError, NotImplementedError):  # it looks both ways, or no further than that
            return None
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    few, more, many = map(size, (_FEW, _MORE, _MANY))
    if few is None:
        return None, 0.0, None
    if more is None or more == few:
        return few, 0.0, None
    growth = (more - few) / (_MORE - _FEW)
    fixed = round(few - _FEW * growth)
    grown = None if many is None else round((many - fixed) / growth)
    return fixed, growth, grown if grown is not None and grown < _MANY else None


def _range(group: list[Row]) -> str:
    first, last = group[0].part, group[-1].part
    return first if len(group) == 1 else f"{first}-{last.rpartition('.')[2]}"


def _cells(row: Row) -> tuple[str, ...]:
    state = "" if row.state_bytes is None else _bytes(float(row.state_bytes))
    grows = "" if row.state_bytes is None else _bytes(row.state_bytes_per_token)
    if row.state_tokens is not None:
        grows += f" up to {row.state_tokens:,}"
    shape, flops = " ".join(map(str, row.shape)), _short(row.flops_per_token) if row.flops_per_token else ""
    return row.kind, shape, f"{row.parameters:,}", row.dtype, state, grows, flops


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"


def _short(n: float) -> str:
    for unit in ("", " k", " M", " G"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"
