"""A model card: what a model is, what it was trained on and by which command, how good it is, how it is loaded."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.loop import flags
from experiments.loop.checkpoints import checkpoint_metrics, sound_step
from experiments.loop.command_line import command_line
from experiments.loop.metrics import read_metrics
from experiments.loop.model_size import count_params
from zoo.models.build import Model
from zoo.models.encoder_heads import SequenceClassifier, SequenceClassifierConfig
from zoo.models.vision import ImageClassifierConfig
from zoo.stack.pattern import mixer_name, pattern_mixers

CARD = "README.md"
# Command -> the module with its `Config` and `PRESETS`.
_TRAINERS = {
    "causal_lm": "experiments.causal_lm",
    "bert pretrain": "experiments.encoders.masked_lm",
    "bert finetune": "experiments.encoders.finetune_presets",
    "bert retrieve": "experiments.retrieval.retrieve",
    "needles": "experiments.needles",
    "vit": "experiments.vision.presets",
}
_KINDS = {
    "CausalLM": ("A causal language model", "text-generation", "AutoModelForCausalLM"),
    "MaskedLM": ("A masked language model", "fill-mask", "AutoModelForMaskedLM"),
    "SequenceClassifier": ("A classifier of texts", "text-classification", "AutoModelForSequenceClassification"),
    "TokenClassifier": ("A classifier of tokens", "token-classification", "AutoModelForTokenClassification"),
    "ImageClassifier": ("A classifier of images", "image-classification", "AutoModelForImageClassification"),
}
_EMBEDDER = ("An encoder of texts as vectors", "sentence-similarity", "SentenceTransformer")


def write_card(folder: Path, model: Model, *, source: str, layout: str, step: int | str = "latest") -> None:
    """Writes the README.md of an exported model.

    Args:
      folder: where the model has been written.
      model: what has been written.
      source: the folder of a run, a published folder, or a name on the hub.
      layout: the layout that it is in.
      step: which checkpoint of a run.
    """
    what, task, loader = _kind(model)
    head = {"tags": ["subquadratic-zoo", *_mixers(model)], "pipeline_tag": task}
    if layout == "transformers":
        head["library_name"] = "sentence-transformers" if loader == "SentenceTransformer" else "transformers"
    name, run = Path(source).resolve().name if Path(source).exists() else source, Path(source)
    said = f"{what}, `{model.config.pattern}`, written in the {layout} layout."
    parts = [_front(head), f"# {name}", said, _shape(model)]
    if (run / "checkpoints").is_dir():
        parts += _training(run, sound_step(run, step))
    parts.append(_loading(folder.name, layout, loader))
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def training_command(run: Path) -> tuple[str, Any] | None:
    """The command that trains a run, and its configuration; None where its config.json is of another command."""
    for command, module in _TRAINERS.items():
        trainer = importlib.import_module(module)
        try:
            config = flags.load_config(trainer.Config, run / "config.json")
        except (ValueError, FileNotFoundError):
            continue
        return command_line(f"python -m experiments.{command}", config, trainer.PRESETS), config
    return None


def _kind(model: Model) -> tuple[str, str, str]:
    if isinstance(model, SequenceClassifier) and not model.config.n_labels:
        return _EMBEDDER
    return _KINDS[type(model).__name__]


def _mixers(model: Model) -> list[str]:
    return list(dict.fromkeys(map(mixer_name, pattern_mixers(model.config.pattern, model.config.n_layers))))


def _front(head: Mapping[str, Any]) -> str:
    """What the hub reads of a card."""
    lines = []
    for name, value in head.items():
        lines += [f"{name}:", *(f"- {one}" for one in value)] if isinstance(value, list) else [f"{name}: {value}"]
    return "\n".join(["---", *lines, "---"])


def _shape(model: Model) -> str:
    config = model.config
    rows: dict[str, Any] = {"parameters": f"{count_params(config):,}", "pattern": f"`{config.pattern}`"}
    rows |= {"layers": config.n_layers, "width": config.d_model}
    if isinstance(config, ImageClassifierConfig):
        rows |= {"classes": config.n_classes}
    else:
        rows |= {"vocabulary": f"{config.vocab_size:,}"}
    if isinstance(config, SequenceClassifierConfig):
        rows["a row's vector"] = config.pool
    return _table(("", ""), rows | {"dtype": config.param_dtype})


def _training(run: Path, step: int) -> list[str]:
    """Data, command and scores of a run's checkpoint."""
    parts = ["## Training"]
    if known := training_command(run):
        command, config = known
        parts += [f"Data: {_data(config)}. Checkpoint of step {step:,}.", f"```bash\n{command}\n```"]
    else:
        parts.append(f"Checkpoint of step {step:,}.")
    metrics = checkpoint_metrics(run, step) or _measured(run, step)
    if metrics:
        parts += ["## Held-out metrics", _table(("metric", "value"), {n: f"{v:.4g}" for n, v in metrics.items()})]
    return parts


def _measured(run: Path, step: int) -> dict[str, float]:
    """What was measured last, up to a step."""
    records = [r for r in read_metrics(run) if r["split"] == "validation" and r["step"] <= step]
    last = records[-1] if records else {}
    return {n: v for n, v in last.items() if isinstance(v, float) and n not in ("time", "seconds")}


def _data(config: Any) -> str:
    """Where the data come from, or what they are where none are named."""
    given = [getattr(config.data, name, None) for name in ("path", "hub", "fetched", "loco_documents")]
    named = [f"`{value}`" for value in given if value is not None]
    said = (type(config.data).__doc__ or "").partition("\n")[0]
    default = said.partition("Without ")[2].partition(": ")[2].rstrip(".") or "Python's standard library"
    init = getattr(config, "init", None)
    return (" ".join(named) or default) + (f"; begun from `{init}`" if init else "")


def _loading(name: str, layout: str, loader: str) -> str:
    code = [f'import zoo\n\nmodel = zoo.from_pretrained("{name}")']
    if layout == "transformers" and loader == "SentenceTransformer":
        code.append(f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")')
    elif layout == "transformers":
        reader = "AutoImageProcessor" if "Image" in loader else "AutoTokenizer"
        code.append(
            f"from transformers import {loader}, {reader}\n\n"
            f'model = {loader}.from_pretrained("{name}")\nreader = {reader}.from_pretrained("{name}")'
        )
    return "\n\n".join(["## Loading", *(f"```python\n{one}\n```" for one in code)])


def _table(names: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {names[0]} | {names[1]} |", "| --- | --- |", *lines])
