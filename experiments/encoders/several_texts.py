"""Masked language models of several texts at once, each a task: rows of every text in each batch.

    python -m experiments.bert pretrain tiny --model.pattern attn/moe --data.path prose/ --tasks code/ tables/
    python -m experiments.bert pretrain tiny --model.pattern attn/moe --data.path prose/ --tasks code/ tables/
        --model.moe.n-tasks 3                      # with a router for each text; `python -m experiments.reuse task`

Batches have equally many rows of each text. Where mixtures of experts have a router for each task, the rows of text 0
(--data.path), 1, 2, ... go by that of their number; evaluations say the loss of each text, and their mean.

Source: Liang et al. 2022, arXiv:2210.14793 (M3ViT), section 3.2 (a router for each task).
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from experiments.data.corpus import Corpus, DataConfig, load_corpus
from experiments.data.tokenizers import save_tokenizer
from experiments.loop.train import BatchIterator, Task


def check_texts(paths: Sequence[str], model: zoo.EncoderConfig, batch_size: int, rows: str) -> None:
    """Raises a ValueError where the texts, the routers and the batch do not go together."""
    n = 1 + len(paths)
    if model.moe.n_tasks not in (1, n):
        raise ValueError(
            f"--model.moe.n-tasks {model.moe.n_tasks}, expected 1, a router for all texts, or {n}, one for each: "
            "--data.path and those of --tasks"
        )
    if paths and batch_size % n:
        raise ValueError(f"--train.batch-size {batch_size}, expected a multiple of {n}: rows of each text")
    if paths and rows == "buckets":
        raise ValueError("--rows buckets with --tasks, expected packed or padded: rows of one length")


def load_texts(corpus: Corpus, data: DataConfig, paths: Sequence[str]) -> list[Corpus]:
    """The first text, and the others in its tokens.

    Raises:
      ValueError, FileNotFoundError: as `load_corpus`.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(corpus.tokenizer, Path(folder))
        others = [dataclasses.replace(data, path=path, hub=None) for path in paths]
        return [corpus, *(load_corpus(other, Path(folder)) for other in others)]


def inputs_of(corpora: Sequence[Corpus]) -> dict[str, str]:
    """What a run learns from, see `fingerprints.check_inputs`."""
    found = corpora[0].inputs()
    for i, corpus in enumerate(corpora[1:], 1):
        found |= {f"{name} of text {i}": value for name, value in corpus.inputs().items() if name != "tokenizer"}
    return found


class Together:
    """Batches of several texts as one, the rows of the first before those of the second."""

    def __init__(self, parts: Sequence[BatchIterator]):
        self._parts = parts

    def __next__(self) -> dict[str, Any]:
        batches = [next(part) for part in self._parts]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def __iter__(self):
        return self

    def get_state(self) -> dict[str, Any]:
        return {str(i): part.get_state() for i, part in enumerate(self._parts)}

    def set_state(self, state: dict[str, Any], /) -> None:
        for i, part in enumerate(self._parts):
            part.set_state(state[str(i)])


def joined(tasks: Sequence[Task]) -> Task:
    """The task of all texts, from that of each; one alone is itself."""
    if len(tasks) == 1:
        return tasks[0]

    def evaluate(model: Any) -> dict[str, float]:
        each = [task.evaluate(model) for task in tasks]
        mean = {name: statistics.mean(found[name] for found in each) for name in ("loss", "accuracy")}
        return mean | tasks[0].describe(mean["loss"]) | {f"loss_text{i}": found["loss"] for i, found in enumerate(each)}

    return tasks[0]._replace(
        batches=Together([task.batches for task in tasks]),
        evaluate=evaluate,
        tokens_per_batch=sum(task.tokens_per_batch for task in tasks),
    )
