"""A smaller model out of a trained one: what is needed least goes, and what is left makes up for it.

    python -m experiments.reuse prune runs/causal_lm/tiny small --n-layers 3 --n-heads 192 --data.path my.txt
    python -m experiments.causal_lm tiny --init small --teacher runs/causal_lm/tiny --data.path my.txt --steps 200

What is needed is read off some of the text, which is the training text at best; the second command teaches the small
model what the large one says. n-heads are Mamba-2's, -3's and attention's heads, and Mamba-1's inner channels.

With --gates.steps units go that the loss does not need: gates of random size on all of them are trained on the text.

Of the vocabulary stay the tokens that all of the text makes most often, with their merges: every text can still be
written, in more tokens. A teacher must read the same tokens, so it loses them first:

    python -m experiments.reuse prune LARGE large --vocabulary 8000 --data.path my.txt
    python -m experiments.reuse prune large small --d-ff 512 --data.path my.txt
    python -m experiments.causal_lm PRESET --init small --teacher large --data.path my.txt

Source: Muralidharan et al. 2024, arXiv:2407.14679; Ansell et al. 2023, arXiv:2306.01709 (BiStil: layers and
vocabulary); Dutta et al. 2024, arXiv:2406.05276 (VTrans: gates); see `zoo.prune`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, cast

import numpy as np

import zoo
from experiments.data.corpus import Corpus, DataConfig
from experiments.data.fewer_tokens import most_frequent
from experiments.loop import flags
from experiments.model_folders import load_model
from experiments.reusing.calibrating import Calibration, batches_of, said, text_for
from experiments.reusing.fewer_tokens import renumber_folder
from experiments.reusing.gates import GatesConfig, trained_scores
from experiments.reusing.written import require_empty, write_model

_AT_ONCE = 1 << 24  # tokens that are counted at once


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a smaller model."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    d_model: int | None = None
    """Width between the blocks. None: the model's."""
    d_ff: int | None = None
    """Hidden width of channel mixers. None: the model's."""
    n_heads: int | None = None
    """Heads of the mixers, of Mamba-1 inner channels. None: the model's."""
    n_layers: int | None = None
    """Blocks. None: the model's."""
    vocabulary: int | None = None
    """Tokens of a BPE, special ones and letters among them. None: all."""
    compensate: bool = True
    """Whether what is left makes up for what goes."""
    data: DataConfig = DataConfig()
    """Text; its tokenizer is the model's."""
    calibration: Calibration = Calibration()
    """How much of it is read."""
    gates: GatesConfig = GatesConfig()
    """Which heads and hidden channels go, by a training."""

    def __post_init__(self):
        if self.gates.steps and self.d_ff is None and self.n_heads is None:
            raise ValueError(f"--gates.steps {self.gates.steps} without --d-ff or --n-heads: no units go by gates")
        if self.gates.steps and self.n_layers is not None:
            raise ValueError(
                f"--gates.steps {self.gates.steps} with --n-layers: let layers go first, by a command alone"
            )


def main() -> int:
    """Loads, looks, prunes, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse prune", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded, text = load_model(config.source), text_for(config.source, config.data)
        ids = None if config.vocabulary is None else most_frequent(text.tokenizer, _counts(text), config.vocabulary)
        scores = None
        if config.gates.steps:
            widths = {"d_ff": config.d_ff, "n_heads": config.n_heads}
            scores = trained_scores(cast(zoo.CausalLM, loaded.model), text, config.data.seq_len, config.gates, **widths)
            if scores is None:
                return 0
        model = zoo.prune(
            loaded.model,
            batches_of(text.train, config.data.seq_len, config.calibration),
            d_model=config.d_model,
            d_ff=config.d_ff,
            n_heads=config.n_heads,
            n_layers=config.n_layers,
            vocabulary=None if ids is None else ids.tolist(),
            importance=scores,
            compensate=config.compensate,
        )
        write_model(model, config.target, loaded, config.source)
        if ids is not None:
            renumber_folder(config.target, ids)
        text_now = None if ids is None else text_for(str(config.target), config.data)
    print(f"{config.source} -> {config.target}: {said(loaded.model, model, text, config, text_now)}")
    return 0


def _counts(text: Corpus) -> np.ndarray:
    """How often each token is in the training text."""
    counts = np.zeros(text.tokenizer.vocab_size, np.int64)
    for start in range(0, len(text.train.tokens), _AT_ONCE):
        counts += np.bincount(text.train.tokens[start : start + _AT_ONCE], minlength=len(counts))
    return counts


if __name__ == "__main__":
    flags.run(main)
