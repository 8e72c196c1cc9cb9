"""A model from one layout to another, or out of the folder of a run.

    python -m experiments.convert runs/causal_lm/tiny out                          # ours, which holds every model
    python -m experiments.convert runs/causal_lm/tiny out --layout official        # what state-spaces/mamba loads
    python -m experiments.convert state-spaces/mamba-130m out --layout transformers
    python -m experiments.convert out back --layout official --dtype bfloat16

`zoo.from_pretrained`, and every command here that takes a model, read what is written; it is read back and compared
before the command says so. In our own layout it says, too, which published layouts would hold the model, and what the
others lack. Beside the weights go the tokenizer, in files from which AutoTokenizer gives the same ids, what a causal
model begins and ends texts with, its chat template where it has one, and a model card, README.md.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

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
from experiments.loop import flags
from experiments.model_card import write_card
from experiments.retrieval.sentence_modules import CONFIG_FILE as SENTENCE_FILE
from experiments.retrieval.sentence_modules import MODULES_FILE, TRANSFORMER_FILE
from experiments.vision.meaning import IMAGES_FILE, load_meaning, write_preprocess
from zoo.models.build import Model
from zoo.published.layout_options import Layout
from zoo.published.pretrained import find_folder, read_config_file, what_lacks
from zoo.published.run_folder import is_run
from zoo.published.transformers_fields import class_fields, named_classes

# What sentence-transformers reads besides, from a folder of its own: pooling, normalisation, prompts, lengths.
_SENTENCE_FILES = (MODULES_FILE, TRANSFORMER_FILE, SENTENCE_FILE, "[0-9]*/config.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts weights, config and tokenizer."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    layout: Layout = "native"
    """native: ours, for every model. official: what state-spaces/mamba, HazyResearch/m2 or hustvl/Vim loads.
    transformers: what transformers loads; Mamba-3, Vision Mamba and M2-BERT are not among it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to store weights in. None: that of the source."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    max_shard_gb: float = 5.0
    """Largest file, in 10^9 bytes; more become numbered shards."""
    allow_nonfinite: bool = False
    """Take weights that are infinite or no numbers as they are, rather than refuse them."""


def main() -> int:
    """Loads, writes, reads back and compares."""
    config = flags.parse_one(Config, prog="python -m experiments.convert", description=__doc__)
    with flags.usage_errors():
        if config.target.exists() and any(config.target.iterdir()):
            raise ValueError(f"{config.target} is not empty; choose another folder")
        model, folder, extra = _load(config)
        limit = int(config.max_shard_gb * 1e9)
        zoo.save_pretrained(model, config.target, config.layout, extra=extra, max_shard_bytes=limit)
        _write_companions(config, folder, model)
        written = _params(zoo.from_pretrained(config.target, allow_nonfinite=config.allow_nonfinite))
        for path, expected in _params(model).items():
            if np.asarray(written[path]).tobytes() != np.asarray(expected).tobytes():
                raise ValueError(f"{config.target}: {path} does not read back as it was written")
    size = sum(param.size for param in written.values())
    print(f"{config.source} -> {config.target}: {size:,} parameters in the {config.layout} layout, read back and equal")
    if config.layout == "native":
        for layout in get_args(Layout)[1:]:
            reason = what_lacks(model, layout)
            print(f"--layout {layout}: " + (f"not this model, {reason}" if reason else "would hold it, too"))
    return 0


def _load(config: Config) -> tuple[Model, Path, dict[str, Any]]:
    """The model, the folder of what lies beside it, and more fields of its config."""
    if is_run(folder := Path(config.source)):
        model = zoo.from_pretrained(
            folder, dtype=config.dtype, revision=config.checkpoint, allow_nonfinite=config.allow_nonfinite
        )
        if (folder / IMAGES_FILE).is_file():
            return model, folder, dict(named_classes(load_meaning(folder).classes))
        if (folder / LABELS_FILE).is_file():
            target = load_target(folder)
            return in_own_unit(model, target), folder, config_fields(target, getattr(model.config, "n_labels", 0))
        if config.layout != "official" and isinstance(model, zoo.CausalLM) and (folder / FILE_NAME).is_file():
            return model, folder, {"eos_token_id": restore_tokenizer(folder).eot}
        return model, folder, {}
    folder = find_folder(config.source)
    find_companions(folder, (*NAMES, *_SENTENCE_FILES))  # what is wrong with them is said before anything is written
    published = zoo.from_pretrained(folder, dtype=config.dtype, allow_nonfinite=config.allow_nonfinite)
    raw, _ = read_config_file(folder)
    keep = _TOKEN_IDS if config.layout != "official" else ()
    n_classes = getattr(published.config, "n_classes", getattr(published.config, "n_labels", 0))
    extra = {name: raw[name] for name in keep if name in raw}
    return published, folder, extra | class_fields(raw, n_classes)


def _write_companions(config: Config, folder: Path, model: Model) -> None:
    """The tokenizer, what images go through, and the model card; a published folder's own files stay as they are."""
    run = is_run(folder)
    if not run:
        sentences = (folder / MODULES_FILE).is_file() and (config.target / MODULES_FILE).is_file()
        names = (*NAMES, *(_SENTENCE_FILES if sentences else ()))
        copy_companions(find_companions(folder, names), folder, config.target)
    publish_target(folder, config.target)
    if (folder / IMAGES_FILE).is_file():
        write_preprocess(load_meaning(folder), config.target)
    if (tokenizer := _tokenizer(folder)) is not None:
        said = model.config
        if isinstance(said, zoo.EncoderConfig):
            types = said.type_vocab_size > 1
            export_tokenizer(tokenizer, config.target, rows="encoder", max_length=longest(said), token_types=types)
        elif isinstance(said, zoo.CausalLMConfig):
            templates = chat_templates(folder) if run else {}
            if templates:
                save_chat_templates(templates, config.target)
            export_tokenizer(tokenizer, config.target, rows="chats" if templates else "documents" if run else "plain")
            if config.layout != "official":
                ends = chat_ends(folder, tokenizer, said.vocab_size).closing if templates else ()
                export_generation(tokenizer, config.target, ends)
    write_card(config.target, model, source=config.source, layout=config.layout, step=config.checkpoint)


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


def _params(model) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): param[...] for path, param in flat}


if __name__ == "__main__":
    flags.run(main)
