"""A language model in 16, 8 and 4 bits: how well it guesses, how large it is, how long a token takes.

    python -m experiments.data fetch smollm2
    python -m experiments.bench quantized smollm2 --data.path my.txt
    python -m experiments.bench quantized runs/causal_lm/tiny --forms float32 int4 mixed

Perplexity is that of held-out text; MB is what all of a model's arrays take in memory, embeddings, norms and scales
too; ms is the time of one more token in a context, of the median round, where all forms take turns. 4 bits are rounded
(int4) or rounded in order, the later inputs making up for what the earlier lost (int4-hessian); mixed has bytes midway
between int2 and int4, mixed-int4 those of int4; 2, 4 or 8 bits a map, or an expert. Embeddings stay as they are unless
--embeddings is given.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.bench import record, turns
from experiments.bench.contenders import Call
from experiments.bench.decode import Decoder
from experiments.causal.load import load_causal
from experiments.data import fetch
from experiments.data.corpus import DataConfig, load_corpus
from experiments.loop import flags
from experiments.reusing.calibrating import Calibration, batches_of, perplexity
from zoo.reuse.quantize import quantized_weights

Form = Literal["float32", "bfloat16", "int8", "int4", "int4-hessian", "int2", "mixed", "mixed-int4"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, in which forms, on which text."""

    model: Annotated[str, flags.Positional]
    """A run of experiments.causal_lm, a published folder, a name on the hub, or of experiments.data."""
    forms: tuple[Form, ...] = ("float32", "bfloat16", "int8", "int4", "int4-hessian", "mixed")
    """What is compared."""
    group_size: int = 64
    """Inputs that share a scale."""
    embeddings: bool = False
    """Whether tables of embeddings are in 8 bits."""
    data: DataConfig = DataConfig(seq_len=256, allow_short_documents=True)
    """Text; its tokenizer is the model's."""
    calibration: Calibration = Calibration()
    """How much of the training text is looked at."""
    eval_batches: int = 8
    """Batches of held-out text, of as many rows."""
    context: int = 256
    """Positions that a decoded token sees."""
    tokens: int = 4
    """Tokens decoded in one timed call."""
    rounds: int = 5
    """Timed calls of each form."""
    json: Path | None = None
    """File to write all figures to."""


def bytes_of(model: nnx.Module) -> int:
    """What a model's arrays take."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


def make_form(form: Form, model: zoo.CausalLM, moments: Any, config: Config) -> zoo.CausalLM:
    """A model in one of the forms."""
    options: dict[str, Any] = {"group_size": config.group_size, "embeddings": config.embeddings}
    if form == "float32":
        return model
    if form == "bfloat16":
        return in_bfloat16(model)
    if form.startswith("mixed"):
        several: tuple[Any, ...] = (2, 4)
        small = [quantized_weights(zoo.quantize(model, bits=b, group_size=config.group_size)) for b in several]
        few, more = (sum(linear.weight.nbytes for linear in each.values()) for each in small)
        budget = more if form == "mixed-int4" else (few + more) // 2
        return zoo.quantize(model, moments=moments, mixed=budget, group_size=config.group_size)
    bits: Any = int(form.removeprefix("int").partition("-")[0])
    return zoo.quantize(
        model, bits=bits, method="hessian" if "hessian" in form else "round", moments=moments, **options
    )


def in_bfloat16(model: zoo.CausalLM) -> zoo.CausalLM:
    """A model in bfloat16 but for what is at least float32 in any: decays, norms, states."""
    config = dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16")
    graphdef, like = nnx.split(nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0))))
    cast = jax.tree.map(lambda x, to: jnp.asarray(x, to.dtype), nnx.state(model), like)
    return nnx.merge(graphdef, cast)


def main() -> int:
    """Makes every form, measures it, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench quantized", description=__doc__)
        known = config.model in fetch.SETS and not Path(config.model).exists()
        source = str(fetch.path(config.model)) if known else config.model
        loaded = load_causal(source, dtype="float32")
        corpus = load_corpus(dataclasses.replace(config.data, tokenizer=loaded.spec))
        seen = batches_of(corpus.train, config.data.seq_len, config.calibration)
        looked = any(form == "int4-hessian" or form.startswith("mixed") for form in config.forms)
        moments = zoo.calibrate(loaded.model, seen) if looked else None
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    n = config.eval_batches * config.calibration.batch_size * config.data.seq_len
    print(f"{config.model}: {n:,} tokens of held-out text at most; a token after {config.context}", flush=True)
    figures: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for form in config.forms:
        model = make_form(form, loaded.model, moments, config)
        how: dict[str, Any] = {"batch_size": config.calibration.batch_size, "max_batches": config.eval_batches}
        found = perplexity(model, corpus.validation, seq_len=config.data.seq_len, **how)
        figures[form] = {"form": form, "perplexity": found, "bytes": bytes_of(model)}
        calls[form] = Decoder(model).call(1, config.context, config.tokens)
        print(f"{form}: perplexity {found:.4g}, {bytes_of(model) / 1e6:,.1f} MB", flush=True)
    for name, times in turns.time_in_turns(calls, config.rounds, label="decoding").items():
        figures[name]["ms"] = statistics.median(times) / config.tokens
        figures[name]["rounds"] = [ms / config.tokens for ms in times]
    print(f"\n| {'form':<12} | {'perplexity':>10} | {'MB':>8} | {'ms a token':>10} |\n| --- | ---: | ---: | ---: |")
    for name, row in figures.items():
        print(f"| {name:<12} | {row['perplexity']:10.4g} | {row['bytes'] / 1e6:8,.1f} | {row['ms']:10.1f} |")
    if config.json:
        record.save_record(config.json, config, environment, list(figures.values()))
    return 0


if __name__ == "__main__":
    flags.run(main)
