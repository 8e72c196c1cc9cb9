"""Weights in and out: strict, in the dtype asked for, onto one device or many.

model = zoo.from_pretrained("state-spaces/mamba-130m", kind=zoo.CausalLM)    a hub name, or a folder
model = zoo.from_pretrained("runs/causal_lm/tiny")                           or that of a training run
zoo.save_pretrained(model, "mine")                                           any model, for this library
zoo.save_pretrained(model, "out", layout="transformers")                     where there is such a layout, for others
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Sharding

from zoo.models.build import Kind, Model, ModelConfig, abstract, in_dtype, require_kind, stacks_of
from zoo.models.causal import CausalLM
from zoo.models.encoder import EncoderConfig
from zoo.models.encoder_heads import MaskedLM, MaskedLMConfig
from zoo.models.frozen import thaw
from zoo.models.heads import with_head
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from zoo.published import (
    adapted_run,
    bert_layout,
    clip_layout,
    few_bits_run,
    hybrid_layout,
    llama_layout,
    llava_layout,
    m2_layout,
    native_layout,
    run_folder,
    ssm_layout,
    vim_layout,
    vit_layout,
)
from zoo.published.bounds import require_counts, require_layers, require_values, require_widths
from zoo.published.checkpoint_files import read_params
from zoo.published.hybrid_family import floored_steps
from zoo.published.json_files import read_json
from zoo.published.layout_options import Layout, require_layout
from zoo.published.model_types import require_model_type
from zoo.published.plain_weights import copied, require_floating, require_plain_config
from zoo.published.presets import presets
from zoo.published.sharding_rules import Placing, sharding_of
from zoo.published.ssm_layout import EMBEDDINGS
from zoo.published.tensors import Entry, Json, Table
from zoo.published.transformers_fields import with_both_ways
from zoo.published.weight_files import FILES, LazyTensor, open_weights, save_weights
from zoo.reuse.adapt import LoRAWeight, merge_lora
from zoo.reuse.linear_maps import ComputedWeight
from zoo.reuse.quantize import options_of, quantizable, with_options

_CONFIG_FILES = ("config.json", "params.json")  # the second is Codestral-Mamba's
# Layouts whose files have prefixes that our tables leave out.
_SHORTENING: tuple[tuple[Any, Callable[[Json], bool]], ...] = (
    (vit_layout, vit_layout.is_vit),
    (hybrid_layout, hybrid_layout.is_hybrid),
    (clip_layout, clip_layout.is_clip),
    (llava_layout, llava_layout.is_llava),
)
_ADAPTER_FILE = "adapter_config.json"  # peft's, of a LoRA say
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "consolidated.safetensors", "*.pth")  # the first there alone
_TOKEN_VECTORS = (
    *EMBEDDINGS.values(),
    llama_layout.WORD_EMBEDDINGS,
    hybrid_layout.WORD_EMBEDDINGS,
    m2_layout.WORD_EMBEDDINGS,
    *bert_layout.WORD_EMBEDDINGS,
)
_INPUTS = (*_TOKEN_VECTORS, *llava_layout.WORD_EMBEDDINGS, vit_layout.PATCHES, vim_layout.PATCHES, clip_layout.PATCHES)


@overload
def from_pretrained(
    path_or_repo: str | os.PathLike,
    *,
    kind: type[Kind],
    dtype: Dtype | None = None,
    sharding: Placing | None = None,
    revision: str | int | None = None,
    leave_dense: bool = False,
    allow_nonfinite: bool = False,
    as_transformers: bool = False,
    masters: bool = False,
) -> Kind: ...
@overload
def from_pretrained(
    path_or_repo: str | os.PathLike,
    *,
    kind: None = None,
    dtype: Dtype | None = None,
    sharding: Placing | None = None,
    revision: str | int | None = None,
    leave_dense: bool = False,
    allow_nonfinite: bool = False,
    as_transformers: bool = False,
    masters: bool = False,
) -> Model: ...
def from_pretrained(
    path_or_repo: str | os.PathLike,
    *,
    kind: type | None = None,
    dtype: Dtype | None = None,
    sharding: Placing | None = None,
    revision: str | int | None = None,
    leave_dense: bool = False,
    allow_nonfinite: bool = False,
    as_transformers: bool = False,
    masters: bool = False,
) -> Model:
    """Loads a model: one that `save_pretrained` wrote, that of a training run, or a published one.

    Published ones are Mambas (1, Falcon, 2, Codestral, 3, Vision), Llama, Mistral, Qwen2, Qwen3, M2-BERT, BERTs, ViT
    and DeiT, the image encoders of CLIP and SigLIP, LLaVA around any of these language models, and hybrids: mamba2attn,
    Jamba, Bamba, Falcon-H1, Granite 4 (granitemoehybrid), Nemotron-H and -3, Zamba2.

    A `CausalLM`; published encoders are a `MaskedLM`, or what the file holds instead of that head: a
    `SequenceClassifier`, with n_labels=0 where there is no classifier, or a `TokenClassifier`. M2-BERT ignores padding
    as it was trained to; see `EncoderConfig.mask_padding`. A folder of sentence-transformers says in 1_Pooling how
    `embed` pools a row. Images have an `ImageClassifier`, with n_classes=0 where there is no classifier. Vision Mamba's
    checkpoints have no config: it follows from their tensors, for images of 224 pixels unless a config.json says
    otherwise; see `zoo.vim_layout`.

    Strict: every tensor in the files is used, every parameter is set, all shapes agree, and what is stored twice (a
    head beside the embedding it is tied to) is stored equal. Weights are read from memory-mapped files, one tensor at a
    time, and nothing that a `.bin` or `.pth` file says is executed. They are floating-point numbers, all finite in the
    dtype that they are loaded in; quantised ones are refused.

    Args:
      path_or_repo: a folder with config.json (or params.json) and weights, in our own layout or that of
        state-spaces/mamba, of HazyResearch/m2, of transformers or of sentence-transformers; a `.pth` file of
        hustvl/Vim, or a folder with one; the folder of a training run (needs orbax-checkpoint), whose parameters are
        their running mean where training kept one, with adapters merged, or in the few bits that it trained for; or
        else a name on the Hugging Face hub, "owner/name" or "owner/name/file.pth", from its cache or the network.
      kind: the class that the model must be of, e.g. `zoo.CausalLM`, by which type checkers know what they get. None:
        any.
      dtype: of parameters and computation, e.g. "bfloat16". None: as stored, or as a config of ours says. Decay
        rates, step-size biases, skips, norms and states are at least float32.
      sharding: where parameters go: one `jax.sharding.Sharding` for all, a rule such as `shard_largest(mesh)`, or a
        mesh, over which they lie as the table of `zoo.layers.mesh_axes` says. Each device gets its part and no more.
        None: the ambient mesh (`jax.set_mesh`), else the default device.
      revision: branch, tag or commit on the hub; of a run, its checkpoint: a step, "latest" or "best". None: latest.
      leave_dense: whether a folder of sentence-transformers may have Dense modules, which the model's `embed` lacks and
        the caller applies. Otherwise one that has them is an error.
      allow_nonfinite: whether weights may be infinite or not numbers, to look at a model that has broken. Otherwise a
        tensor with such values is an error that names it.
      as_transformers: whether to compute what transformers (5.24) does where that is not what the config says: in
        Nemotron-H and Zamba2, whose steps it raises to time_step_min.
      masters: whether a run that trains in few bits gives the floats that it trains, rather than what these are read
        as. Of all else there is nothing but floats, or nothing but few bits.

    Raises:
      FileNotFoundError: no such folder, file or hub name, or no config or weights in it.
      ValueError: a config or tensors that do not fit: names what is missing, left over, or of another shape. Or a model
        of another kind: names it, before any weights are read.
      ImportError: a hub name without the package huggingface_hub, a run without orbax-checkpoint.

    Examples:
      >>> import tempfile
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> folder = tempfile.mkdtemp()
      >>> zoo.save_pretrained(model, folder)
      >>> zoo.from_pretrained(folder, kind=zoo.CausalLM).config == model.config
      True
    """
    place = _find(path_or_repo, None if revision is None else str(revision))
    if run_folder.is_run(place) and adapted_run.is_adapted(place):
        run_folder.find_checkpoint(place, revision)  # before the base is read
        load: Any = functools.partial(from_pretrained, kind=kind, dtype=dtype, sharding=sharding)
        base: Model = load(adapted_run.base_of(place), allow_nonfinite=allow_nonfinite)
        return merge_lora(adapted_run.load_trained(place, base, revision))
    if run_folder.is_run(place) and few_bits_run.is_in_few_bits(place) and not masters:
        bits = few_bits_run.read_few_bits(place)  # before anything large is
        load = functools.partial(from_pretrained, kind=kind, sharding=sharding, revision=revision)
        return few_bits_run.in_dtype(bits.of(load(place, allow_nonfinite=allow_nonfinite, masters=True)), dtype)
    if run_folder.is_run(place):
        opened = _open_run(place, kind, revision)
    elif inside := run_folder.runs_inside(place):
        raise FileNotFoundError(f"{place} holds several runs, name one of them: {', '.join(inside)}")
    else:
        raw, source = read_config_file(place)
        if native_layout.is_native(raw):
            opened = _open_native(place, raw, source, kind)
        else:
            raw = floored_steps(raw) if as_transformers else raw
            opened = _open_published(place, raw, source, kind, leave_dense=leave_dense)
    config = opened.config
    with _errors_name(opened.source):
        if dtype is not None or opened.stored is not None:
            config = in_dtype(config, jnp.dtype(opened.stored if dtype is None else dtype).name)
        for stack in stacks_of(config).values():
            require_layers(stack.n_layers, stack.pattern, len(opened.tensors))
        model = with_options(abstract(config), opened.quantized)
        params = dict(nnx.to_flat_state(nnx.state(model, native_layout.STORED)))
        require_values(params, opened.tensors.values())
    tensors, table = opened.tensors, opened.table(model)
    _require_a_fit(place, table, tensors, params)
    for name, entry in table.entries.items():
        parts = [tensors[part].mapped for part in table.stacks.get(name, ())]
        tensor = np.stack(parts) if parts else tensors[name].mapped
        arrays = entry.split(tensor, [params[path].shape for path in entry.paths])
        for path, array in zip(entry.paths, arrays, strict=True):
            rule = sharding_of(sharding, path, params[path])
            copy = functools.partial(copied, named=f"{place}: {name}", allow_nonfinite=allow_nonfinite)
            params[path] = params[path].replace(_place(array, params[path].dtype, rule, copy))
    nnx.update(model, nnx.from_flat_state(list(params.items())))
    return model


class _Opened(NamedTuple):
    """A model's files, described and not yet read."""

    source: Path
    """The file that says which model it is."""
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    table: Callable[[Model], Table]
    """Which of the tensors is which parameter of the model."""
    stored: Dtype | None
    """The dtype to compute in, where that of the tensors alone says it. None: the config does."""
    quantized: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """How weights are quantised, see `options_of`."""


def _open_run(folder: Path, kind: type | None, revision: str | int | None) -> _Opened:
    checkpoint = run_folder.find_checkpoint(folder, revision)
    config = run_folder.read_model_config(folder, checkpoint)
    require_kind(kind, config, f"the model of {folder}")
    tensors = {name: LazyTensor(array) for name, array in read_params(checkpoint).items()}
    return _Opened(folder / run_folder.MODEL_FILE, config, tensors, native_layout.tensor_table, None)


def _open_native(place: Path, raw: Json, source: Path, kind: type | None) -> _Opened:
    tensors = open_weights(place)
    with _errors_name(source):
        require_plain_config(raw)
        for stack in (raw["config"], *(raw["config"].get(name) for name in ("vision", "text"))):
            if isinstance(stack, dict):
                require_layers(stack.get("n_layers"), stack.get("pattern"), len(tensors))
        require_widths(raw["config"], tensors.values())
        config = native_layout.read_config(raw)
        require_kind(kind, config, "the model")
        quantized = native_layout.read_quantized(raw)
    return _Opened(source, config, tensors, native_layout.tensor_table, None, quantized)


def _open_published(place: Path, raw: Json, source: Path, kind: type | None, *, leave_dense: bool) -> _Opened:
    stored_tensors = open_weights(place)
    tensors = {_without_wrappers(name): tensor for name, tensor in stored_tensors.items()}
    if len(tensors) < len(stored_tensors):
        raise ValueError(f"{place}: tensors that differ in the prefix 'model.' alone")
    with _errors_name(source):
        require_widths(raw, tensors.values())
        pooling = None
        if _is_bert(raw):
            folder = place.parent if place.is_file() else place
            tensors, pooling = (
                bert_layout.short_names(tensors),
                bert_layout.read_pooling(folder, leave_dense=leave_dense),
            )
        for layout_of, belongs in _SHORTENING:
            if belongs(raw):
                tensors = layout_of.short_names(tensors)
        n_labels = tensors["classifier.weight"].shape[0] if "classifier.weight" in tensors else 0
        config = _read_config(raw, {name: tensor.shape for name, tensor in tensors.items()}, n_labels, pooling)
        require_kind(kind, config, "the model")
        config = _fit_vocabulary(config, tensors)
    stored = next((tensors[name].dtype for name in _INPUTS if name in tensors), jnp.float32)
    theirs = EMBEDDINGS["transformers"] in tensors or llava_layout.is_llava(raw)
    layout: Layout = "transformers" if theirs else "official"
    return _Opened(source, config, tensors, lambda model: _table(model, layout, raw), stored)


def save_pretrained(
    model: Model,
    folder: str | os.PathLike,
    layout: Layout = "native",
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model so that it can be loaded again, or that others can load it.

    Args:
      model: any, for the layout "native". The published layouts hold Mamba-1, Mamba-2 or Mamba-3, alone or with gated
        channel mixers, with attention in some layers or none, Vision Mamba, Llama (a causal attn/mlp), a hybrid as
        Jamba, Bamba, Falcon-H1, Granite, Nemotron-H or Zamba2 are, M2-BERT, BERT, ModernBERT, ViT, DeiT, the encoders
        of CLIP or SigLIP, or a vision-language model as LLaVA is.
      folder: made if it does not exist.
      layout: "native", ours (config.json, model.safetensors), which holds every model, those with mixers of one's own
        too; "official", what state-spaces/mamba or HazyResearch/m2 loads (config.json, pytorch_model.bin) or what
        hustvl/Vim loads (checkpoint.pth; the config.json is for us); or "transformers" (config.json,
        model.safetensors), which has neither Mamba-3 nor Vision Mamba nor M2-BERT nor mamba2attn, and alone has Llama,
        the other hybrids, BERT, ModernBERT, ViT, DeiT, CLIP's and SigLIP's encoders and LLaVA; an encoder of text
        without a head is written for sentence-transformers too, with how its rows are pooled.
      extra: more fields of config.json that do not change the model, such as eos_token_id for transformers, or
        id2label, {0: "no", 1: "yes"}, what the classes are called.
      max_shard_bytes: largest file; more become numbered shards with an index. A `.pth` is never cut.

    Raises:
      ValueError: a model that the layout cannot describe, or fields that it does not have: names the option; one with
        adapters, or with quantised weights and another layout than the native one.
      FileExistsError: weights of another format lie there already and would be read instead.

    Examples:
      >>> import os, tempfile
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> folder = tempfile.mkdtemp()
      >>> zoo.save_pretrained(model, folder, layout="transformers")
      >>> sorted(os.listdir(folder))
      ['config.json', 'model.safetensors']
    """
    require_layout(layout)
    _require_parameters(model, layout)
    model = thaw(model)
    if layout != "native" and isinstance(model, MaskedLM) and model.decoder is not None:
        model = with_head(model, MaskedLMConfig, decoder_layers=0, decoder_pattern=None, rngs=0)
    write = _describe_native if layout == "native" else functools.partial(_describe_published, layout=layout)
    written = write(model, dict(extra or {}))
    folder = Path(folder)
    save_weights(folder, written.tensors, format=written.format, max_shard_bytes=max_shard_bytes)
    for name, content in written.beside.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(written.raw, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")


def _require_parameters(model: Model, layout: Layout) -> None:
    """Raises a ValueError where weights are no parameters, but for quantised ones in our own layout."""
    for name, linear in quantizable(model).items():
        if isinstance(linear.weight, LoRAWeight):
            raise ValueError(
                f"{name} has an adapter: zoo.merge_lora makes one model of both, zoo.save_adapter saves it"
            )
        if isinstance(linear.weight, ComputedWeight) and layout != "native":
            raise ValueError(f"{name} is quantised: layout={layout!r} has plain weights, see zoo.dequantize")


def what_lacks(model: Model, layout: Layout) -> str:
    """What of a model a layout does not hold, as the error of `save_pretrained` says it; "" where it holds it all."""
    try:
        _require_parameters(model, layout)
        if layout != "native":
            _write_config(model.config, layout)
    except ValueError as error:
        return str(error)
    return ""


class _Written(NamedTuple):
    """What the files of a model are to hold."""

    raw: Json
    """config.json."""
    tensors: Mapping[str, np.ndarray]
    format: Literal["safetensors", "bin", "pth"]
    beside: Mapping[str, Json]
    """Other files, by name."""


def _describe_native(model: Model, extra: Json) -> _Written:
    if clash := sorted(extra.keys() & native_layout.FIELDS):
        raise ValueError(f"extra={extra!r}, expected fields other than {clash[0]!r}, which describes the model")
    params = nnx.to_flat_state(nnx.state(model, native_layout.STORED))
    tensors = {".".join(map(str, path)): np.asarray(param[...]) for path, param in params}
    return _Written(native_layout.write_config(model.config, options_of(model)) | extra, tensors, "safetensors", {})


def _describe_published(model: Model, extra: Json, *, layout: Layout) -> _Written:
    try:
        raw = _write_config(model.config, layout)
    except ValueError as error:
        raise ValueError(f"{error}; layout='native' holds every model") from error
    table = _table(model, layout, raw)
    encoder = model.config if isinstance(model.config, EncoderConfig) and _is_bert(raw) else None
    beside = {} if encoder is None else bert_layout.pooling_files(encoder)
    classes = getattr(model.config, "n_classes" if isinstance(model, ImageClassifier) else "n_labels", 0)
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    shapes = {name: entry.shape([params[path].shape for path in entry.paths]) for name, entry in table.entries.items()}
    said = (shapes, classes, beside.get(bert_layout.POOLING_FILE))
    described = _read_config(raw, *said)
    if layout == "official" and isinstance(model, CausalLM):
        ssm_layout.require_official_fields(extra)
    raw |= with_both_ways(extra, classes)
    if _read_config(raw, *said) != described:
        raise ValueError(f"extra={extra!r} describes another model")
    tensors = {
        name: entry.join([np.asarray(params[path]) for path in entry.paths]) for name, entry in table.entries.items()
    }
    for name, parts in table.stacks.items():
        tensors |= dict(zip(parts, tensors.pop(name), strict=True))
    tensors = {_full_name(name, model, raw): tensor for name, tensor in tensors.items()}
    if layout == "official":  # the official code stores copies and constants all the same
        tensors |= {name: tensors[original] for name, original in table.copies.items()} | {**table.constants}
    official: Literal["bin", "pth"] = "pth" if vim_layout.is_vim(raw) else "bin"
    return _Written(raw, tensors, official if layout == "official" else "safetensors", beside)


def _full_name(name: str, model: Model, raw: Json) -> str:
    """A tensor's name in the file, out of that in the table."""
    if isinstance(model.config, EncoderConfig) and _is_bert(raw):
        return bert_layout.full_name(name, model.config)
    if hybrid_layout.is_hybrid(raw):
        return hybrid_layout.full_name(name, raw["model_type"])
    if llama_layout.is_llama(raw):
        return llama_layout.full_name(name)
    if isinstance(model, ImageClassifier) and vit_layout.is_vit(raw):
        return vit_layout.full_name(name, model.config)
    if isinstance(model, VisionLanguageModel):
        return llava_layout.full_name(name)
    return name


def tensor_names(config: ModelConfig, layout: Layout) -> dict[tuple, str]:
    """What a published file calls each parameter that is a tensor of its own there, by the parameter's path.

    Raises:
      ValueError: a model that the layout cannot describe.
    """
    return {path: name for path, (name, _) in published_tensors(config, layout).items()}


def published_tensors(config: ModelConfig, layout: Layout) -> dict[tuple, tuple[str, Entry]]:
    """The same, and how the tensor lies there."""
    model, raw = abstract(config), _write_config(config, layout)
    table = _table(model, layout, raw)
    alone = {entry.paths[0]: (name, entry) for name, entry in table.entries.items() if len(entry.paths) == 1}
    return {
        path: (_full_name(name, model, raw), entry) for path, (name, entry) in alone.items() if name not in table.stacks
    }


def _find(path_or_repo: str | os.PathLike, revision: str | None) -> Path:
    """The folder of a published model, or the `.pth` file that is asked for, out of a repository on the hub too."""
    path = Path(path_or_repo)
    if path.suffix == ".pth" and path.is_file():
        return path
    if not (named := re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w.-]+\.pth)", str(path_or_repo))) or path.is_dir():
        return find_folder(path_or_repo, revision=revision)
    folder = find_folder(named[1], revision=revision, weights=(named[2],))
    if not (folder / named[2]).is_file():
        raise FileNotFoundError(f"{folder} holds no {named[2]}")
    return folder / named[2]


def find_folder(
    path_or_repo: str | os.PathLike, *, revision: str | None = None, weights: Collection[str] = _WEIGHTS
) -> Path:
    """The folder of a published model: the one given, or the hub's in its cache, downloaded where it is not there.

    Args:
      path_or_repo: a folder, or a name on the hub.
      revision: branch, tag or commit on the hub.
      weights: patterns of weight files; those of the first that the hub has are downloaded, no others.

    Raises:
      FileNotFoundError: neither is there.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)):
        hint = f"; the preset of that name is zoo.create({path_or_repo!r}, rngs=0)" if path_or_repo in presets else ""
        raise FileNotFoundError(f"{path_or_repo} is neither a folder nor a name on the hub (owner/name){hint}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{path_or_repo} is no folder; to load from the hub: pip install huggingface_hub") from error

    def download(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(str(path_or_repo), revision=revision, allow_patterns=patterns))

    about = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*_Dense/*"]  # the last: what follows a pooling
    try:
        for pattern in weights:
            folder = download([*about, pattern])
            if any(folder.glob(pattern)):
                break
    except (OSError, ValueError) as error:  # what the hub's errors are: not found, no access, offline
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{path_or_repo} is no folder here, and not to be had from the hub: {reason}"
        ) from error
    return folder


def read_config_file(place: Path) -> tuple[Json, Path]:
    """The config of a published model as it is in its file, and the file.

    Vision Mamba's checkpoints have none: what says so is then in place of it, and their place in that of the file.

    Args:
      place: a folder, or a `.pth` file beside which the config is.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object, or what is there is an adapter of a model.
    """
    folder = place.parent if place.is_file() else place
    path = next((folder / name for name in _CONFIG_FILES if (folder / name).is_file()), None)
    adapter = folder / _ADAPTER_FILE
    if adapter.is_file() and not any((folder / name).is_file() for name in FILES):
        base = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(f"{folder} holds an adapter of {base!r:.80}, no model: merge it into that, and save the whole")
    if path is None and (place.is_file() or any(folder.glob("*.pth"))):
        return {"model_type": "vim"}, place
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(_CONFIG_FILES)}")
    return read_json(path), path


def _without_wrappers(name: str) -> str:
    """A tensor's name without what parallel training (module.) and torch.compile (_orig_mod.) put before names."""
    return re.sub(r"^(module\.|model\.)+", "", re.sub(r"(^|\.)_orig_mod\.", r"\1", name))


class _errors_name:
    """Puts a file's name in front of errors about its values."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, KeyError):
            raise ValueError(f"{self.path}: {error.args[0]} is missing") from error
        if isinstance(error, ValueError | TypeError):
            raise ValueError(f"{self.path}: {error}") from error
        # What values of other kinds than expected, or absurd ones, make Python raise.
        if isinstance(error, ArithmeticError | IndexError | AttributeError | RecursionError | MemoryError):
            raise ValueError(f"{self.path} describes no model: {type(error).__name__}: {error}") from error


def _is_bert(raw: Json) -> bool:
    return bert_layout.is_bert(raw) and not m2_layout.is_m2_bert(raw)  # older M2-BERTs say that they are BERT


def _read_config(raw: Json, tensors: Mapping[str, tuple[int, ...]], n_labels: int, pooling: Json | None) -> ModelConfig:
    """The model of a config; tensors are the shapes of those in the file."""
    require_plain_config(raw)
    require_counts(raw, len(tensors))
    if vim_layout.is_vim(raw):
        return vim_layout.read_config(raw, tensors)
    if vit_layout.is_vit(raw):
        return vit_layout.read_config(raw, tensors, n_labels)
    if clip_layout.is_clip(raw):
        return clip_layout.read_config(raw)
    if llava_layout.is_llava(raw):
        for part in llava_layout.parts(raw):
            require_counts(part, len(tensors))
        return llava_layout.read_config(raw, ssm_layout.read_config)
    if m2_layout.is_m2_bert(raw):
        return m2_layout.read_config(raw, tensors, n_labels)
    if _is_bert(raw):
        return bert_layout.read_config(raw, tensors, n_labels, pooling)
    require_model_type(raw)
    return ssm_layout.read_config(raw)


def _write_config(config: ModelConfig, layout: Layout) -> Json:
    require_layout(layout)
    if isinstance(config, VisionLanguageConfig):
        if layout != "transformers":
            raise ValueError(f"a VisionLanguageModel has no {layout} layout, expected 'native' or 'transformers'")
        return llava_layout.write_config(config, ssm_layout.write_config(config.text, layout))
    if isinstance(config, ImageClassifierConfig) and layout == "transformers" and clip_layout.describes(config):
        return clip_layout.write_config(config)
    if isinstance(config, ImageClassifierConfig):
        return (vim_layout if layout == "official" else vit_layout).write_config(config)
    if not isinstance(config, EncoderConfig):
        return ssm_layout.write_config(config, layout)
    if layout == "transformers" and config.pattern != "m2/monarch":
        return bert_layout.write_config(config)
    return m2_layout.write_config(config, layout)


def _table(model: Model, layout: Layout, raw: Json) -> Table:
    if isinstance(model, CausalLM) and hybrid_layout.is_hybrid(raw):
        return hybrid_layout.tensor_table(model, raw["model_type"])
    if isinstance(model, VisionLanguageModel):
        return llava_layout.tensor_table(model, _table(model.language, layout, llava_layout.parts(raw)[1]))
    if isinstance(model, ImageClassifier) and clip_layout.is_clip(raw):
        return clip_layout.tensor_table(model)
    if isinstance(model, ImageClassifier):
        return (vim_layout if vim_layout.describes(model.config) else vit_layout).tensor_table(model)
    if isinstance(model, CausalLM):
        return ssm_layout.tensor_table(model, layout)
    if model.config.pattern == "m2/monarch":
        return m2_layout.tensor_table(model)
    return bert_layout.tensor_table(model)


def _fit_vocabulary(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """Takes the padding of the vocabulary from the embedding, where it is to a usual multiple that the config omits."""
    if isinstance(config, ImageClassifierConfig | VisionLanguageConfig):
        return config
    shapes = [tensors[name].shape for name in _TOKEN_VECTORS if name in tensors]
    rows = next((shape[0] for shape in shapes if shape), config.padded_vocab_size)
    for multiple in (config.pad_vocab_multiple, 1, 8, 16, 32, 64, 128, 256):
        padded = dataclasses.replace(config, pad_vocab_multiple=multiple)
        if padded.padded_vocab_size == rows:
            return padded
    return config


def _require_a_fit(place: Path, table: Table, tensors: Mapping[str, LazyTensor], params: Mapping[tuple, Any]) -> None:
    """Raises a ValueError unless tensors and parameters correspond one to one, in shape too."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in table.entries.items():
        shape = entry.shape([params[path].shape for path in entry.paths])
        shapes |= dict.fromkeys(table.stacks[name], shape[1:]) if name in table.stacks else {name: shape}
    missing = sorted(shapes.keys() - tensors.keys())
    known = shapes.keys() | table.copies.keys() | table.constants.keys()
    left_over = sorted(name for name in tensors.keys() - known if not table.ignored.match(name))
    differing = [
        f"{name} is {tensors[name].shape}, expected {shapes[name]}"
        for name in sorted(shapes.keys() & tensors.keys())
        if tensors[name].shape != shapes[name]
    ]
    parts = [
        f"{count} {what}: {', '.join(names[:8])}{', ...' if count > 8 else ''}"
        for what, names in (
            ("missing in the file", missing),
            ("in the file that the model does not have", left_over),
            ("of another shape", differing),
        )
        if (count := len(names))
    ]
    if parts:
        raise ValueError(f"{place}: the tensors do not fit the config. " + "; ".join(parts))
    dtypes = {name: params[entry.paths[0]].dtype for name, entry in table.entries.items()}
    codes = {name for name, dtype in dtypes.items() if not jnp.issubdtype(dtype, jnp.floating)}
    if wrong := [name for name in sorted(codes) if tensors[name].dtype != dtypes[name]]:
        found, expected = tensors[wrong[0]].dtype, dtypes[wrong[0]]
        raise ValueError(f"{place}: {wrong[0]} is {found}, expected {expected}, codes of this size")
    require_floating(place, tensors, sorted(shapes.keys() - codes))
    for name in sorted(table.copies.keys() & tensors.keys()):
        original = table.copies[name]
        stored, other = tensors[name].mapped, tensors[original].mapped
        if not np.array_equal(stored, other) and not np.array_equal(stored, other, equal_nan=True):
            raise ValueError(f"{place}: {name} differs from {original}, which the config says it is tied to")
    for name in sorted(table.constants.keys() & tensors.keys()):
        stored, constant = tensors[name].mapped, table.constants[name]
        # Rounding in the dtype that it was stored in, and in the library that computed it.
        if stored.shape != constant.shape or not np.allclose(
            stored.astype(np.float64), constant, rtol=2**-7, atol=1e-6
        ):
            raise ValueError(f"{place}: {name} is not what follows from the config")


def _place(
    array: np.ndarray, dtype: Dtype, sharding: Sharding | None, copy: Callable[[np.ndarray, Dtype], np.ndarray]
) -> jax.Array:
    """A parameter in memory of its own, from a view of a mapped file; each device reads its part alone."""
    if sharding is None:
        return jnp.array(copy(array, dtype))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: copy(array[index], dtype), dtype=dtype)
