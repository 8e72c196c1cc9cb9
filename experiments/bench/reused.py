"""What starting from a trained model is worth, at equal steps, over several seeds: bits per byte of held-out text.

    python -m experiments.bench reused                      # three seeds, small models of bytes; CPU
    python -m experiments.bench reused --seeds 0 --steps 20 # a look

Of each seed a small model is trained on Python's standard library. Then, each against its alternative:

    grow     a model of twice the width and depth: fresh, or grown from the small one, for as many steps
    prune    half of the hidden channels go, with and without making up for them: at once, and after being taught
    gates    half of the hidden channels and of Mamba's inner channels go, by what is lost and by gates that are trained
             for as many steps, refitted both: at once, and after being taught
    factorize  of an attention model: heads half as wide, and channel mixers as Monarch matrices, each by what the maps
             read, by the maps alone, and as many parameters by pruning; at once, and after being taught
    vocabulary  of a model of 1,024 BPE tokens half go: at once, and trained on; beside it the whole one trained on, and
             a fresh one of a BPE of so many, for all of the steps
    adapt    the small model tuned on English (pydoc's topics): all of it, or adapters alone
    merge    that tune and one on tables (encodings) in one model: the mean over both texts, against the share of
             changes that is dropped, which DARE makes up for and dropping alone does not

What is printed is the mean and the standard deviation over seeds.
"""

import dataclasses
import statistics
import sysconfig
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ssm
import zoo
from experiments import causal_lm
from experiments.bench.over_seeds import ROWS, held_out_bits, print_over_seeds
from experiments.data.corpus import DataConfig, load_corpus
from experiments.data.fewer_tokens import most_frequent
from experiments.data.tokenizers import save_tokenizer
from experiments.loop import flags
from experiments.loop.adapting import AdaptConfig
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig
from experiments.reusing.calibrating import Calibration, batches_of
from experiments.reusing.fewer_tokens import renumber_folder
from experiments.reusing.gates import GatesConfig, trained_scores

Part = Literal["grow", "prune", "teach", "gates", "factorize", "vocabulary", "adapt", "merge"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters, the order of the data, and what is dropped."""
    base_steps: int = 400
    """Steps of the small model."""
    steps: int = 100
    """Steps of each alternative."""
    parts: tuple[Part, ...] = ("grow", "prune", "teach", "gates", "factorize", "vocabulary", "adapt", "merge")
    """What is compared. teach: pruned models, after as many steps with the whole one as teacher."""
    penalty: float = GatesConfig.penalty
    """Factor on the divergence of gates."""
    rates: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Shares of the changes that merging drops."""


_SHAPE = zoo.CausalLMConfig(
    d_model=64, n_layers=2, pattern="mamba/mlp", mamba=ssm.MambaConfig(d_state=8), mlp=zoo.MLPConfig(d_ff=128)
)
_LARGE = dataclasses.replace(_SHAPE, d_model=128, n_layers=4, mlp=zoo.MLPConfig(d_ff=256))
_ATTENTION = zoo.CausalLMConfig(
    d_model=64, n_layers=2, pattern="attn/mlp", attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(d_ff=128)
)
_DATA = DataConfig(seq_len=64)
_WORDS = DataConfig(seq_len=64, tokenizer="bpe", bpe_vocab_size=1024)


class Bench:
    """The runs of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        self.config, self.seed, self.folder = config, seed, folder
        library = Path(sysconfig.get_paths()["stdlib"])
        self.texts = {
            "library": _DATA,
            "english": dataclasses.replace(_DATA, path=str(library / "pydoc_data" / "topics.py")),
            "tables": dataclasses.replace(_DATA, path=str(library / "encodings")),
        }

    def train(self, name: str, text: str | DataConfig, steps: int, rate: float = 3e-3, **options: Any) -> zoo.CausalLM:
        """The model of a run."""
        config = causal_lm.Config(
            data=text if isinstance(text, DataConfig) else self.texts[text],
            train=TrainConfig(
                steps=steps, batch_size=ROWS, eval_every=steps, save_every=steps, tensorboard=False, seed=self.seed
            ),
            optim=OptimConfig(learning_rate=rate, warmup_steps=10),
            eval_batches=1,
            **options,
        )
        causal_lm.fit(config, self.folder / name)
        return zoo.from_pretrained(self.folder / name, kind=zoo.CausalLM)

    def save(self, name: str, model: Any) -> str:
        """Writes a model that a run can begin with, which reads bytes."""
        zoo.save_pretrained(model, self.folder / name)
        load_corpus(_DATA).tokenizer.save(self.folder / name)
        return str(self.folder / name)

    def bits(self, model: Any, text: str) -> float:
        """Bits per byte of what is held out of a text."""
        return held_out_bits(model, self.texts[text])

    def measure(self) -> dict[str, float]:
        """Every alternative that is asked for, by name."""
        found: dict[str, float] = {}
        alone = {"factorize": self._factorize, "vocabulary": self._vocabulary}
        if not alone.keys() >= set(self.config.parts):
            base = self.train("base", "library", self.config.base_steps, model=_SHAPE)
            found["small model"] = self.bits(base, "library")
        for part in self.config.parts:
            found |= alone[part]() if part in alone else getattr(self, f"_{part}")(base, str(self.folder / "base"))
        return found

    def _grow(self, base: Any, start: str) -> dict[str, float]:
        fresh = self.train("fresh", "library", self.config.steps, model=_LARGE)
        found = {"grow: fresh": self.bits(fresh, "library")}
        methods: tuple[Any, ...] = ("fpi", "aki")
        for method in methods:
            large = zoo.grow(base, d_model=128, n_layers=4, method=method, rngs=nnx.Rngs(self.seed))
            place = self.save(f"large-{method}", large)
            grown = self.train(f"grown-{method}", "library", self.config.steps, init=place)
            found[f"grow: {method}"] = self.bits(grown, "library")
        return found

    def _pruned(self, base: Any) -> dict[str, Any]:
        looked, names = self._looked(), {"refitted": True, "cut alone": False}
        return {name: zoo.prune(base, looked, d_ff=64, compensate=compensate) for name, compensate in names.items()}

    def _prune(self, base: Any, start: str) -> dict[str, float]:
        return {f"prune: {name}": self.bits(small, "library") for name, small in self._pruned(base).items()}

    def _teach(self, base: Any, start: str) -> dict[str, float]:
        found = {}
        for name, small in self._pruned(base).items():
            place = self.save(f"small {name}", small)
            options: dict[str, Any] = {"rate": 1e-3, "init": place, "teacher": start}
            taught = self.train(f"taught {name}", "library", self.config.steps, **options)
            found[f"prune: {name}, taught"] = self.bits(taught, "library")
        return found

    def _gates(self, base: Any, start: str) -> dict[str, float]:
        gates = GatesConfig(steps=self.config.steps, batch_size=ROWS, seed=self.seed, penalty=self.config.penalty)
        widths: dict[str, Any] = {"d_ff": 64, "n_heads": 64}
        scores = trained_scores(base, load_corpus(_DATA), _DATA.seq_len, gates, **widths)
        found, looked = {}, self._looked()
        for name, importance in (("by what is lost", None), ("by gates", scores)):
            small = zoo.prune(base, looked, **widths, importance=importance)
            found[f"gates: {name}"] = self.bits(small, "library")
            options: dict[str, Any] = {"rate": 1e-3, "init": self.save(name, small), "teacher": start}
            taught = self.train(f"{name}, taught", "library", self.config.steps, **options)
            found[f"gates: {name}, taught"] = self.bits(taught, "library")
        return found

    def _factorize(self) -> dict[str, float]:
        whole = self.train("attention", "library", self.config.base_steps, model=_ATTENTION)
        looked = self._looked()
        smaller = {
            "heads half as wide": zoo.factorize(whole, looked, head_dim=16),
            "heads half as wide, by the maps alone": zoo.factorize(whole, looked, head_dim=16, weighed=False),
            "half of the heads": zoo.prune(whole, looked, n_heads=1),
            "Monarch": zoo.factorize(whole, looked, n_blocks=4),
            "Monarch, by the maps alone": zoo.factorize(whole, looked, n_blocks=4, weighed=False),
        }
        smaller["fewer hidden channels"] = zoo.prune(whole, looked, d_ff=_as_large(whole, smaller["Monarch"]))
        found = {"factorize: whole": self.bits(whole, "library")}
        for name, small in smaller.items():
            found[f"factorize: {name} ({count_params(small.config):,})"] = self.bits(small, "library")
            place = self.save(name, small)
            options: dict[str, Any] = {"rate": 1e-3, "init": place, "teacher": str(self.folder / "attention")}
            taught = self.train(f"{name}, taught", "library", self.config.steps, **options)
            found[f"factorize: {name}, taught"] = self.bits(taught, "library")
        return found

    def _vocabulary(self) -> dict[str, float]:
        half = dataclasses.replace(_WORDS, bpe_vocab_size=_WORDS.bpe_vocab_size // 2)
        whole = self.train("words", _WORDS, self.config.base_steps, model=_SHAPE)
        text = load_corpus(_WORDS, self.folder / "words")
        counts = np.bincount(text.train.tokens, minlength=text.tokenizer.vocab_size)
        ids = most_frequent(text.tokenizer, counts, half.bpe_vocab_size)
        small = zoo.prune(whole, [{"ids": jnp.zeros((1, 2), jnp.int32)}], vocabulary=ids.tolist())
        place = self.folder / "fewer words"
        zoo.save_pretrained(small, place)
        save_tokenizer(text.tokenizer, place)
        renumber_folder(place, ids)
        fewer = dataclasses.replace(_WORDS, tokenizer=str(place))
        on = self.train("words, on", _WORDS, self.config.steps, rate=1e-3, init=str(self.folder / "words"))
        few_on = self.train("fewer, on", fewer, self.config.steps, rate=1e-3, init=str(place))
        fresh = self.train("fresh words", half, self.config.base_steps + self.config.steps, model=_SHAPE)
        return {
            "vocabulary: 1,024 tokens": held_out_bits(whole, _WORDS),
            "vocabulary: 1,024 tokens, trained on": held_out_bits(on, _WORDS),
            "vocabulary: 512 of them": held_out_bits(small, fewer),
            "vocabulary: 512 of them, trained on": held_out_bits(few_on, fewer),
            "vocabulary: 512 tokens, fresh": held_out_bits(fresh, half),
        }

    def _looked(self) -> list[dict[str, Any]]:
        return batches_of(load_corpus(_DATA).train, _DATA.seq_len, Calibration(batches=8, batch_size=ROWS))

    def _adapt(self, base: Any, start: str) -> dict[str, float]:
        options: dict[str, Any] = {"rate": 1e-2, "adapt": AdaptConfig(rank=4)}
        adapted = self.train("adapters", "english", self.config.steps, init=start, **options)
        return {
            "adapt: before": self.bits(base, "english"),
            "adapt: all": self.bits(self._tuned("english", start), "english"),
            "adapt: rank 4": self.bits(adapted, "english"),
        }

    def _merge(self, base: Any, start: str) -> dict[str, float]:
        texts = ("english", "tables")
        tuned = [self._tuned(text, start) for text in texts]
        found = {"merge: before": statistics.mean(self.bits(base, text) for text in texts)}
        for i, text in enumerate(texts):
            found[f"merge: {text} alone"] = statistics.mean(self.bits(tuned[i], other) for other in texts)
        for rate in self.config.rates:
            methods: tuple[Any, ...] = ("dare", "drop") if rate else ("task_arithmetic",)
            for method in methods:
                options: Any = {"rate": rate, "weights": 0.5, "key": jax.random.key(self.seed)}
                merged = zoo.merge(base, tuned, method=method, **options)
                found[f"merge: {method} {rate:g}"] = statistics.mean(self.bits(merged, text) for text in texts)
        return found

    def _tuned(self, text: str, start: str) -> zoo.CausalLM:
        """The small model trained on a text; once."""
        return self.train(text, text, self.config.steps, init=start)


def _as_large(whole: Any, smaller: Any) -> int:
    """Hidden channels of dense channel mixers with as many parameters as another model's have."""
    sizes = [
        sum(x.size for x in jax.tree.leaves(nnx.state(model.backbone.layers[0].mlp, nnx.Param)))
        for model in (whole, smaller)
    ]
    return round(whole.config.mlp.d_ff * sizes[1] / sizes[0])


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench reused", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
