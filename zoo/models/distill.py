"""Attention into state spaces: a trained model whose attention becomes linear attention, and how near the two are.

student = zoo.seed_from_attention(teacher, rngs=nnx.Rngs(0))                      every attention layer
hybrid = zoo.seed_from_attention(teacher, [1, 2, 3, 5, 6, 7], rngs=nnx.Rngs(0))   some; the others stay attention

Queries, keys, values and the output keep their maps (in Mamba-2's terms: C, B, x and out_proj); decay, convolution,
gate and norm are new. What attention has beside these is dropped: rotary embedding or ALiBi, the window, the factor
1 / sqrt(head_dim) and softmax. So a student is a start for training, not a copy: `experiments.distill` trains it.

Source: Liao et al. 2025, arXiv:2502.13145 (mmMamba); Wang et al. 2024, arXiv:2408.15237 (Mamba in the Llama); Bick et
al. 2024, arXiv:2408.10189 (MOHAWK), for the comparison of layers that are fed the same input.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm import LinearAttentionConfig
from zoo.layers.attention import Attention
from zoo.models.build import Model, abstract
from zoo.models.vision_language import VisionLanguageModel
from zoo.stack.backbone import Backbone
from zoo.stack.block import Block
from zoo.stack.layer_inputs import LayerInputs, groups_of, places_of, plus
from zoo.stack.options import write_options
from zoo.stack.pattern import format_pattern, mixer_name, parse_pattern, pattern_mixers

Seed = Literal["mimic", "copy", "random"]


def seed_from_attention(
    model: Model,
    layers: Collection[int] | None = None,
    *,
    config: LinearAttentionConfig = LinearAttentionConfig(),
    init: Seed = "mimic",
    rngs: nnx.Rngs,
) -> Model:
    """A model of the same kind whose attention, in some layers or in all, is linear attention with a decay.

    All parameters outside of these layers' mixers are the given model's own arrays, shared and not copied. Where the
    model looks both ways, each direction starts from the same maps.

    Args:
      model: any model with attention layers; of one that reads images, the language model is converted.
      layers: numbers of the blocks to convert, from 0. None: all that have attention.
      config: options of the new mixers, but for `n_heads`, `n_kv_heads`, `head_dim` and `bias`, which are those of the
        attention, and `init`, which follows from the argument of that name.
      init: mimic: attention's maps are copied, and what is new starts as if attention went on (see
        `LinearAttentionConfig.init`). copy: they are copied, and what is new starts as in Mamba-2. random: nothing is
        copied, for comparison.
      rngs: source of keys for what is new, stream "params".

    Raises:
      ValueError: a layer without attention, or with another mixer beside it; none with it in the model; a model some of
        whose depths share a block; norms of queries and keys (`AttentionConfig.qk_norm`) with maps to be copied.

    Examples:
      >>> attn = zoo.AttentionConfig(n_heads=2)
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="attn/mlp", attn=attn)
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> zoo.seed_from_attention(model, [1], rngs=nnx.Rngs(1)).config.pattern
      'attn/mlp linear_attn/mlp'
    """
    if isinstance(model, VisionLanguageModel):
        language: Any = seed_from_attention(model.language, layers, config=config, init=init, rngs=rngs)
        return model.around(language)
    words = list(parse_pattern(model.config.pattern, model.config.n_layers))
    blocks = backbone_of(model).blocks
    known = [i for i, word in enumerate(words) if word.plain.mixers == ("attn",) and not word.shared]
    chosen = known if layers is None else sorted(set(layers))
    wrong = [i for i in chosen if i not in known]
    if wrong or not chosen:
        what = f"layers={wrong[:1]}" if wrong else f"pattern={model.config.pattern!r}"
        where = ", ".join(map(str, known)) or "in no layer"
        raise ValueError(f"{what}, expected layers with attention: {where}")

    normed = [i for i in chosen if getattr(blocks[i].mixer, "q_norm", None) is not None]
    if normed and init != "random":
        raise ValueError(
            f"init={init!r} with attn.qk_norm=True in layer {normed[0]}, expected 'random': linear attention does not "
            "normalise queries and keys, so their maps alone do not say what attention sees"
        )
    if any(word.shared for word in words):
        raise ValueError(f"pattern={model.config.pattern!r} has blocks that depths share, which cannot be converted")
    config = dataclasses.replace(config, init="mimic" if init == "mimic" else "mamba2")
    wanted = {i: dataclasses.replace(config, **_shape(blocks[i].mixer)) for i in chosen}
    # Options of linear attention that is there already stay where they are; a word says in what it differs from them.
    there = "linear_attn" in map(mixer_name, pattern_mixers(model.config.pattern, model.config.n_layers))
    shared = model.config.linear_attn if there else wanted[chosen[0]]
    for i, options in wanted.items():
        words[i] = words[i]._replace(mixers=("linear_attn" + write_options(_differences(shared, options)),))
    pattern = format_pattern(tuple(words))
    changed = dataclasses.replace(model.config, pattern=pattern, linear_attn=shared)

    new: Any = abstract(changed)
    for i in chosen:
        backbone_of(new).layers[i] = Block(changed, words[i], first=i == 0, rngs=rngs)
    theirs = dict(nnx.to_flat_state(nnx.state(model)))
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(new)):
        converted = _layer_of(path) in chosen and "mixer" in path
        one_way = tuple(part for part in path if not (converted and part in ("forward", "backward")))
        if one_way in theirs and not (converted and init == "random"):
            # Copied where it will be trained, apart from the model that it came from.
            old = theirs[one_way][...]
            filled.append((path, variable.replace(jnp.array(old) if converted else old)))
    nnx.update(new, nnx.from_flat_state(filled))
    return new


def backbone_of(model: Model) -> Backbone:
    """The stack of blocks inside a model of any kind.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.backbone_of(model) is model.backbone
      True
    """
    return model.encoder.backbone if hasattr(model, "encoder") else model.backbone


def converted_layers(teacher: Backbone, student: Backbone) -> tuple[int, ...]:
    """Numbers of the blocks that have attention in the one and another mixer in the other.

    Examples:
      >>> attn = zoo.AttentionConfig(n_heads=2)
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="attn/mlp", attn=attn)
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> student = zoo.seed_from_attention(model, [1], rngs=nnx.Rngs(1))
      >>> zoo.converted_layers(model.backbone, student.backbone)
      (1,)
    """
    pairs = zip(teacher.layers, student.layers, strict=True)
    return tuple(
        i for i, (a, b) in enumerate(pairs) if isinstance(a.mixer, Attention) and not isinstance(b.mixer, Attention)
    )


class Pass(NamedTuple):
    """What comes out of one block."""

    mixed: Float[Array, "b l d"]
    """Of its sequence mixer."""
    out: Float[Array, "b l d"]
    """Of the block."""


class Compared(NamedTuple):
    """A block of the teacher and its counterpart in the student, both fed what enters the teacher's.

    Examples:
      >>> attn = zoo.AttentionConfig(n_heads=2)
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="attn/mlp", attn=attn)
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> student = zoo.seed_from_attention(model, [1], rngs=nnx.Rngs(1))
      >>> [one] = zoo.compare_layers(model.backbone, student.backbone, jnp.ones((1, 4, 16)))
      >>> one.layer, one.x.shape
      (1, (1, 4, 16))
    """

    layer: int
    x: Float[Array, "b l d"]
    """What enters."""
    teacher: Pass
    student: Pass


def compare_layers(
    teacher: Backbone,
    student: Backbone,
    x: Float[Array, "b l d"],
    *,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    layer_inputs: LayerInputs | None = None,
) -> list[Compared]:
    """Runs the teacher, and each converted block of the student on what enters the teacher's block.

    So all layers can learn at once, each from its own teacher, and no error of a lower layer reaches a higher one.

    Args:
      teacher, student: as `seed_from_attention` takes and gives them.
      x: embedded tokens, what both backbones are called with.
      mask, segment_ids, layer_inputs: as in `Backbone`.

    Returns:
      The converted blocks, in order.

    Examples:
      >>> attn = zoo.AttentionConfig(n_heads=2)
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="attn/mlp", attn=attn)
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> student = zoo.seed_from_attention(model, rngs=nnx.Rngs(1))
      >>> compared = zoo.compare_layers(model.backbone, student.backbone, jnp.ones((1, 4, 16)))
      >>> [one.layer for one in compared]
      [0, 1]
    """
    converted, compared = converted_layers(teacher, student), []
    x = teacher._enter(x)
    added, places = groups_of(layer_inputs, x, len(teacher.layers)), places_of(layer_inputs, len(teacher.layers))
    for i, block in enumerate(teacher.layers):
        x = x if places is None else plus(x, added, places[i])
        theirs = _run(block, x, mask, segment_ids)
        if i in converted:
            compared.append(Compared(i, x, theirs, _run(student.layers[i], x, mask, segment_ids)))
        x = theirs.out
    return compared


def _run(block: Block, x, mask, segment_ids) -> Pass:
    mixed, positions = [], {"mask": mask, "segment_ids": segment_ids}

    def mix(normed):
        mixed.append(block.mixer(normed, **positions))
        return mixed[0], (), jnp.float32(0)

    out = block._run(x, mix, positions, None, None)[0]
    return Pass(mixed[0] if mixed else jnp.zeros_like(x), out)


def _shape(attention: Any) -> dict[str, Any]:
    """The options that linear attention has in common with an attention layer."""
    names = ("n_heads", "n_kv_heads", "head_dim")
    return {name: getattr(attention, name) for name in names} | {"bias": attention.config.bias}


def _differences(one: Any, other: Any) -> dict[str, Any]:
    """Fields of the other dataclass that differ from the one's."""
    values = {field.name: getattr(other, field.name) for field in dataclasses.fields(other)}
    return {name: value for name, value in values.items() if value != getattr(one, name)}


def _layer_of(path: Sequence[Any]) -> int | None:
    """Which block a parameter is in."""
    return next((number for part, number in itertools.pairwise(path) if part == "layers"), None)
