"""Text from a run's checkpoint, or from a published model, as it is generated.

python -m experiments.sample runs/causal_lm/tiny --prompt "def "
python -m experiments.sample runs/causal_lm/tiny --prompt "class " --temperature 0 --max-new-tokens 500
python -m experiments.sample --model state-spaces/mamba-130m --prompt "Mamba is"
python -m experiments.sample --model ./my-mamba2 --dtype bfloat16 --prompt "Mamba is"
"""

import dataclasses
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, cast

import jax

import zoo
from experiments.causal.load import load_published
from experiments.causal_lm import load_run
from experiments.data.tokenizers import Tokenizer
from experiments.loop import flags


@dataclasses.dataclass(frozen=True)
class Config:
    """Continues a text with a trained model."""

    run_dir: Annotated[Path | None, flags.Positional] = None
    """Folder of the run. Not with --model."""
    model: str | None = None
    """A published model instead of a run: a folder in a published layout, or a name on the Hugging Face hub."""
    tokenizer: str | None = None
    """With --model: "bytes", a tokenizer.json or its folder, or a name on the hub. None: that of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """With --model: dtype of parameters and computation. None: as stored."""
    prompt: str = ""
    """Text to continue. Empty starts a new document."""
    max_new_tokens: int = 300
    """Tokens to add; less when the model ends the document."""
    samples: int = 1
    """How many continuations."""
    temperature: float = 0.8
    """Below 1 sharpens, above 1 flattens; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the most likely tokens until their probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that were there before."""
    seed: int | None = None
    """Seed of the draws. None: a new one each time; it is printed."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint: latest, best, or a step."""
    allow_nonfinite: bool = False
    """Take weights that are infinite or no numbers as they are, rather than refuse them."""


def main() -> int:
    """Loads the run and prints continuations."""
    config = flags.parse_one(Config, prog="python -m experiments.sample", description=__doc__)
    with flags.usage_errors():
        sampling = zoo.Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
        model, tokenizer, ids = load(config)
        seed = secrets.randbelow(2**31) if config.seed is None else config.seed
        for i in range(config.samples):
            if config.samples > 1:
                print(f"--- sample {i + 1} " + "-" * 40)
            tokens = zoo.generate_stream(
                model,
                ids,
                config.max_new_tokens,
                sampling=sampling,
                eos_id=tokenizer.eot,
                key=jax.random.fold_in(jax.random.key(seed), i),
            )
            print(config.prompt, end="")
            for text in stream_text(tokenizer, (int(token[0]) for token in tokens)):
                print(text, end="", flush=True)
            print()
    print(f"seed {seed}", file=sys.stderr)
    return 0


def load(config: Config) -> tuple[zoo.CausalLM, Tokenizer, list[int]]:
    """The model, its tokenizer and the prompt's ids.

    A run's documents all begin with eot, so its prompts do. Published models do not ask for it.
    """
    if (config.run_dir is None) == (config.model is None):
        raise ValueError("expected either the folder of a run or --model, one of the two")
    if config.model is None:
        for name in ("tokenizer", "dtype"):
            if getattr(config, name) is not None:
                raise ValueError(f"--{name} belongs to --model; a run has its own")
        model, tokenizer, _ = load_run(
            cast(Path, config.run_dir), step=config.checkpoint, allow_nonfinite=config.allow_nonfinite
        )
        return model, tokenizer, [tokenizer.eot, *tokenizer.encode(config.prompt).tolist()]
    model, tokenizer, *_ = load_published(
        config.model, tokenizer=config.tokenizer, dtype=config.dtype, allow_nonfinite=config.allow_nonfinite
    )
    return model, tokenizer, tokenizer.encode(config.prompt).tolist() or [tokenizer.eot]


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """What each token adds to the decoded text. Text that ends in an unfinished character waits for the next token."""
    ids: list[int] = []
    shown = text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


if __name__ == "__main__":
    flags.run(main)
