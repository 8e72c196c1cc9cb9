"""Smaller models of trained ones, each against its alternatives: parts of `python -m experiments.bench reused`.

gates       half of the hidden channels and of Mamba's inner channels go, by what is lost and by gates that are
            trained for as many steps; refitted both
sizes       six layers whose channel mixers shall take as long as those of half the width: all of that width, and
            each of the width by which least is lost, by a table of times
factorize   of an attention model: heads half as wide, and channel mixers as Monarch matrices, each by what the maps
            read, by the maps alone, and as many parameters by pruning
vocabulary  of 1,024 BPE tokens half go: at once, and trained on; beside it the whole one trained on, and a fresh
            one of a BPE of so many, for all of the steps. Then English (pydoc's topics), which is written in some
            of the tokens: half and a quarter go, and none
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from experiments.bench.over_seeds import ROWS, held_out_bits
from experiments.bench.seed_runs import DATA, SHAPE, SeedRuns
from experiments.data.corpus import DataConfig, load_corpus
from experiments.data.fewer_tokens import most_frequent
from experiments.data.tokenizers import save_tokenizer
from experiments.loop.model_size import count_params
from experiments.reusing import latency
from experiments.reusing.fewer_tokens import renumber_folder
from experiments.reusing.gates import GatesConfig, trained_scores

_ATTENTION = zoo.CausalLMConfig(
    d_model=64, n_layers=2, pattern="attn/mlp", attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(d_ff=128)
)
_DEEP = dataclasses.replace(SHAPE, n_layers=6)
_WORDS = DataConfig(seq_len=64, tokenizer="bpe", bpe_vocab_size=1024)


def gates(runs: SeedRuns) -> dict[str, float]:
    """Which units go: by what is lost, and by trained gates."""
    config = GatesConfig(steps=runs.steps, batch_size=ROWS, seed=runs.seed)
    widths: dict[str, Any] = {"d_ff": 64, "n_heads": 64}
    scores = trained_scores(runs.base, load_corpus(DATA), DATA.seq_len, config, **widths)
    looked = runs.looked()
    found: dict[str, float] = {}
    for name, importance in (("by what is lost", None), ("by gates", scores)):
        small = zoo.prune(runs.base, looked, **widths, importance=importance)
        found |= runs.at_once_and_taught(f"gates: {name}", small, runs.start)
    return found


def sizes(runs: SeedRuns) -> dict[str, float]:
    """How wide layers are in the same time: all the same, and by what is lost."""
    whole = runs.train("deep", "library", runs.base_steps, model=_DEEP)
    looked, half = runs.looked(), 64
    times = latency.measure(whole, latency.Config("", Path(), batch_size=ROWS, seq_len=256, turns=10)).times
    chosen = zoo.layer_sizes(whole, looked, times=times, budget=1.001 * _DEEP.n_layers * times[half])
    print("milliseconds", {n: round(ms, 4) for n, ms in times.items()}, "hidden channels", chosen)
    found = {"sizes: whole": runs.bits(whole, "library")}
    for name, d_ff in (("all the same", half), ("by what is lost", chosen)):
        small = zoo.prune(whole, looked, d_ff=d_ff)
        found |= runs.at_once_and_taught(f"sizes: {name}", small, str(runs.folder / "deep"))
    return found


def factorize(runs: SeedRuns) -> dict[str, float]:
    """Products of smaller maps, and as many parameters by pruning."""
    whole = runs.train("attention", "library", runs.base_steps, model=_ATTENTION)
    looked = runs.looked()
    smaller = {
        "heads half as wide": zoo.factorize(whole, looked, head_dim=16),
        "heads half as wide, by the maps alone": zoo.factorize(whole, looked, head_dim=16, weighed=False),
        "half of the heads": zoo.prune(whole, looked, n_heads=1),
        "Monarch": zoo.factorize(whole, looked, n_blocks=4),
        "Monarch, by the maps alone": zoo.factorize(whole, looked, n_blocks=4, weighed=False),
    }
    smaller["fewer hidden channels"] = zoo.prune(whole, looked, d_ff=_as_large(whole, smaller["Monarch"]))
    found = {"factorize: whole": runs.bits(whole, "library")}
    for name, small in smaller.items():
        told = f"factorize: {name} ({count_params(small.config):,})"
        found |= runs.at_once_and_taught(told, small, str(runs.folder / "attention"))
    return found


def vocabulary(runs: SeedRuns) -> dict[str, float]:
    """Fewer tokens of the text that they were made for, and of another."""
    half = dataclasses.replace(_WORDS, bpe_vocab_size=512)
    whole = runs.train("words", _WORDS, runs.base_steps, model=SHAPE)
    fresh = runs.train("fresh words", half, runs.base_steps + runs.steps, model=SHAPE)
    found = {"vocabulary: 512 tokens, fresh": held_out_bits(fresh, half)}
    english = dataclasses.replace(_WORDS, path=runs.texts["english"].path, tokenizer=str(runs.folder / "words"))
    for text, where, numbers in ((_WORDS, "", (512,)), (english, ", English", (768, 512))):
        on = runs.train(f"words, on{where}", text, runs.steps, rate=1e-3, init=str(runs.folder / "words"))
        found[f"vocabulary: 1,024 tokens{where}"] = held_out_bits(whole, text)
        found[f"vocabulary: 1,024 tokens{where}, trained on"] = held_out_bits(on, text)
        for n in numbers:
            found |= _fewer_words(runs, whole, text, n, where)
    return found


PARTS = {"gates": gates, "sizes": sizes, "factorize": factorize, "vocabulary": vocabulary}


def _fewer_words(runs: SeedRuns, whole: Any, data: DataConfig, n: int, where: str) -> dict[str, float]:
    """A model of the tokens that a text makes most often, at once and trained on."""
    text = load_corpus(data, runs.folder / "words")
    counts = np.bincount(text.train.tokens, minlength=text.tokenizer.vocab_size)
    ids = most_frequent(text.tokenizer, counts, n)
    place = runs.folder / f"{n} words{where}"
    small = zoo.prune(whole, [{"ids": jnp.zeros((1, 2), jnp.int32)}], vocabulary=ids.tolist())
    zoo.save_pretrained(small, place)
    save_tokenizer(text.tokenizer, place)
    renumber_folder(place, ids)
    fewer = dataclasses.replace(data, tokenizer=str(place))
    on = runs.train(f"{n} on{where}", fewer, runs.steps, rate=1e-3, init=str(place))
    name = f"vocabulary: {n} of them{where}"
    return {name: held_out_bits(small, fewer), f"{name}, trained on": held_out_bits(on, fewer)}


def _as_large(whole: Any, smaller: Any) -> int:
    """Hidden channels of dense channel mixers with as many parameters as another model's have."""
    sizes = [
        sum(x.size for x in jax.tree.leaves(nnx.state(model.backbone.layers[0].mlp, nnx.Param)))
        for model in (whole, smaller)
    ]
    return round(whole.config.mlp.d_ff * sizes[1] / sizes[0])
