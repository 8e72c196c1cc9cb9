"""A model's folder: the weights, and all that lies beside them, into another folder.

The tokenizer is written in files from which AutoTokenizer gives the same ids; with it go what a causal model begins and
ends texts with, its chat template where it has one, what images go through, labels and classes, and a model card.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import zoo
from experiments.causal.text_ends import chat_ends
from experiments.companions import NAMES, copy_companions, find_companions
from experiments.data.chat_template import chat_templates, save_chat_templates
from experiments.data.export_tokenizer import export_generation, export_tokenizer
from experiments.data.tokenizer_files import FILE_NAME, VOCABULARY
from experiments.data.tokenizers import Tokenizer, published_tokenizer, restore_tokenizer
from experiments.encoders.lengths import longest
from experiments.encoders.objectives import FILE_NAME as LABELS_FILE
from experiments.encoders.objectives import load_target
from experiments.encoders.publish import config_fields, in_own_unit, publish_target
from experiments.model_card import write_card
from experiments.retrieval.sentence_modules import CONFIG_FILE as SENTENCE_FILE
from experiments.retrieval.sentence_modules import MODULES_FILE, TRANSFORMER_FILE
from experiments.vision.meaning import IMAGES_FILE, load_meaning, write_preprocess
from zoo.models.build import Model
from zoo.published.layout_options import Layout
from zoo.published.pretrained import find_folder, read_config_file
from zoo.published.run_folder import is_run
from zoo.published.transformers_fields import class_fields, named_classes

# What sentence-transformers reads besides, from a folder of its own: pooling, normalisation, prompts, lengths.
_SENTENCE_FILES = (MODULES_FILE, TRANSFORMER_FILE, SENTENCE_FILE, "[0-9]*/config.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Said(TypedDict):
    """What a command is told of where a model comes from and goes to."""

    layout: Layout
    checkpoint: str | int


class Loaded(NamedTuple):
    """A model out of a folder."""

    model: Model
    folder: Path
    """Where what lies beside it is."""
    extra: dict[str, Any]
    """More fields of its config.json."""


def load_model(
    source: str,
    *,
    dtype: str | None = None,
    checkpoint: str | int = "latest",
    layout: Layout = "native",
    allow_nonfinite: bool = False,
) -> Loaded:
    """A model and what is said beside it.

    Args:
      source: the folder of a run, a folder in our own or a published layout, or a name on the hub.
      dtype: of its weights. None: that of the source.
      checkpoint: which of a run.
      layout: what it is to be written in.
      allow_nonfinite: see `zoo.from_pretrained`.
    """
    if is_run(folder := Path(source)):
        model = zoo.from_pretrained(folder, dtype=dtype, revision=checkpoint, allow_nonfinite=allow_nonfinite)
        if (folder / IMAGES_FILE).is_file():
            return Loaded(model, folder, dict(named_classes(load_meaning(folder).classes)))
        if (folder / LABELS_FILE).is_file():
            target = load_target(folder)
            fields = config_fields(target, getattr(model.config, "n_labels", 0))
            return Loaded(in_own_unit(model, target), folder, fields)
        if layout != "official" and isinstance(model, zoo.CausalLM) and (folder / FILE_NAME).is_file():
            return Loaded(model, folder, {"eos_token_id": restore_tokenizer(folder).eot})
        return Loaded(model, folder, {})
    folder = find_folder(source)
    find_companions(folder, (*NAMES, *_SENTENCE_FILES))  # what is wrong with them is said before anything is written
    published = zoo.from_pretrained(folder, dtype=dtype, allow_nonfinite=allow_nonfinite)
    raw, _ = read_config_file(folder)
    keep = _TOKEN_IDS if layout != "official" else ()
    n_classes = getattr(published.config, "n_classes", getattr(published.config, "n_labels", 0))
    extra = {name: raw[name] for name in keep if name in raw}
    return Loaded(published, folder, extra | class_fields(raw, n_classes))


def write_companions(
    folder: Path, target: Path, model: Model, *, source: str, layout: Layout, checkpoint: str | int = "latest"
) -> None:
    """The tokenizer, what images go through, and the model card; a published folder's own files stay as they are.

    Args:
      folder: what lies in it, see `Loaded`.
      target: where the model has been written.
      model: what has been written.
      source, layout, checkpoint: as for `load_model`, for the card.
    """
    run = is_run(folder)
    if not run:
        sentences = (folder / MODULES_FILE).is_file() and (target / MODULES_FILE).is_file()
        names = (*NAMES, *(_SENTENCE_FILES if sentences else ()))
        copy_companions(find_companions(folder, names), folder, target)
    publish_target(folder, target)
    if (folder / IMAGES_FILE).is_file():
        write_preprocess(load_meaning(folder), target)
    if (tokenizer := _tokenizer(folder)) is not None:
        said = model.config
        if isinstance(said, zoo.EncoderConfig):
            types = said.type_vocab_size > 1
            export_tokenizer(tokenizer, target, rows="encoder", max_length=longest(said), token_types=types)
        elif isinstance(said, zoo.CausalLMConfig):
            templates = chat_templates(folder) if run else {}
            if templates:
                save_chat_templates(templates, target)
            export_tokenizer(tokenizer, target, rows="chats" if templates else "documents" if run else "plain")
            if layout != "official":
                ends = chat_ends(folder, tokenizer, said.vocab_size).closing if templates else ()
                export_generation(tokenizer, target, ends)
    write_card(target, model, source=source, layout=layout, step=checkpoint)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a run or a published folder, None where there is none."""
    if is_run(folder):
        return restore_tokenizer(folder) if (folder / FILE_NAME).is_file() else None
    if not any((folder / name).is_file() for name in (FILE_NAME, VOCABULARY)):
        return None
    try:
        return published_tokenizer(folder)
    except ValueError as error:
        print(f"note: the tokenizer's files are copied as they are: {error}", file=sys.stderr)
        return None
