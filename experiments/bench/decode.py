"""How large the cache is and how long a token takes, against the context: attention, and what replaces it.

    python -m experiments.bench decode                                     # 1k to 32k tokens, shapes of SmolLM2-135M
    python -m experiments.bench decode --contexts 1024 8192 --json out.json --plot out.png
    python -m experiments.bench decode --patterns attn "attn linear_attn*3" --batch 8

The models are a teacher of attention alone and students of it, as `experiments.distill` makes them by its --pattern,
with random parameters, in float32: neither the cache nor the time depends on what was learned. Nothing is prefilled;
the cache holds zeros for all positions but the last, which is decoded again and again. Contenders take turns, round
after round; each figure is the median of the rounds that all took, and the ratio is to the first pattern. Where
something else runs on the machine, the ratios say more than the times.

MiB is the size of the cache, what `init_state` gives for the context, counted exactly: keys, values and their positions
in attention, the state of each head and the end of the convolution in linear attention.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments import distill
from experiments.bench import record, turns
from experiments.bench.contenders import Call
from experiments.bench.panels import draw
from experiments.loop import flags
from experiments.loop.model_size import count_params
from zoo.layers.attention import AttentionState

# What is measured -> its name in a figure.
MEASURES = {"MiB of the cache": "mib", "ms a token": "ms"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time, at which contexts, and how often. Shapes are those of SmolLM2-135M."""

    patterns: tuple[str, ...] = ("attn", "attn linear_attn", "linear_attn")
    """What each layer's mixer is, attn or linear_attn; cycles. Others are compared with the first."""
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    """Positions that the decoded token sees, itself included."""
    batch: int = 1
    """Rows."""
    d_model: int = 576
    """Width of the residual stream."""
    layers: int = 30
    """Blocks, each a mixer and a gated MLP."""
    heads: int = 9
    """Heads of queries."""
    kv_heads: int = 3
    """Heads of keys and values."""
    d_ff: int = 1536
    """Width inside the MLPs."""
    vocab_size: int = 49152
    """Tokens; their embedding is the head too."""
    tokens: int = 4
    """Tokens decoded in one timed call."""
    rounds: int = 7
    """Timed calls of each contender, after two that are not counted; 3 at most for calls of 2 seconds and more."""
    json: Path | None = None
    """File to write all figures to: every time of every round, the hardware and the versions."""
    plot: Path | None = None
    """Picture to draw: cache and time against the context."""

    def __post_init__(self):
        for name in ("batch", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not self.patterns or not self.contexts or min(self.contexts) < 1:
            raise ValueError("expected at least one of patterns, and of contexts of at least 1")
        for pattern in self.patterns:
            students_layers(pattern, self.layers)


def teacher(config: Config) -> zoo.CausalLMConfig:
    """The model of attention alone."""
    return zoo.CausalLMConfig(
        d_model=config.d_model,
        n_layers=config.layers,
        pattern="attn/mlp",
        vocab_size=config.vocab_size,
        attn=zoo.AttentionConfig(n_heads=config.heads, n_kv_heads=config.kv_heads),
        mlp=zoo.MLPConfig(d_ff=config.d_ff),
    )


def students_layers(pattern: str, layers: int) -> list[int]:
    """Numbers of the layers that a pattern converts; none for attention alone."""
    if pattern == "attn":
        return []
    return distill.chosen_layers(pattern, zoo.CausalLMConfig(n_layers=layers, pattern="attn/mlp"))


def make_models(config: Config) -> dict[str, zoo.CausalLM]:
    """A model for each pattern; what they have in common is shared."""
    attention = zoo.CausalLM(teacher(config), rngs=nnx.Rngs(0))
    models = {}
    for pattern in config.patterns:
        layers = students_layers(pattern, config.layers)
        student = zoo.seed_from_attention(attention, layers, rngs=nnx.Rngs(0)) if layers else attention
        models[pattern] = cast(zoo.CausalLM, student)
    return models


def cache_bytes(model: zoo.CausalLM, batch: int, context: int) -> int:
    """Bytes of the cache for a context."""
    state = jax.eval_shape(lambda: model.init_state(batch, context))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def full_state(model: zoo.CausalLM, batch: int, context: int) -> tuple:
    """A state in which one more token sees `context` positions: zeros at all of them but its own."""

    def fill(state):
        if not isinstance(state, AttentionState):
            return state
        before = jnp.broadcast_to(jnp.arange(context), (batch, context)).at[:, -1].set(-1)
        # Each array on its own, since a call gives the memory of all of them away.
        return state._replace(
            value=jnp.array(state.value),
            slot_index=before.astype(jnp.int32),
            next_index=jnp.full((batch,), context - 1, jnp.int32),
            segment=jnp.zeros((batch,), jnp.int32),
        )

    return _each_state(fill, model.init_state(batch, context))


def _each_state(function, state):
    return jax.tree.map(function, state, is_leaf=lambda s: isinstance(s, AttentionState))


class Decoder:
    """Decodes with a model. The one compiled function serves all contexts whose state has the same shape.

    Args:
      model: a language model.
    """

    def __init__(self, model: zoo.CausalLM):
        self.model = model
        graphdef, self._params = nnx.split(model)

        def step(params, token, state):
            logits, state = nnx.merge(graphdef, params).extend(token, state)
            return logits, _each_state(_back, state)

        self._step = jax.jit(step, donate_argnums=2)

    def call(self, batch: int, context: int, tokens: int) -> Call:
        """A call that decodes some tokens one by one, each as the last of its context."""
        state = full_state(self.model, batch, context)
        ids = jax.random.randint(jax.random.key(0), (tokens, batch, 1), 0, self.model.config.vocab_size)

        def decode():
            nonlocal state
            for token in ids:
                logits, state = self._step(self._params, token, state)
            return jax.block_until_ready(logits)

        return decode


def _back(state):
    """The position that was written comes next again."""
    return state._replace(next_index=state.next_index - 1) if isinstance(state, AttentionState) else state


def main() -> int:
    """Times every pattern at every context and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench decode", description=__doc__)
        decoders = {pattern: Decoder(model) for pattern, model in make_models(config).items()}
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    sizes = ", ".join(f"{pattern} {count_params(each.model.config):,}" for pattern, each in decoders.items())
    print(f"float32, b={config.batch} d_model={config.d_model} layers={config.layers}; parameters: {sizes}")
    print(f"\n| {'context':>7} | {'pattern':<20} | {'MiB':>8} | {'ratio':>6} | {'ms':>8} | {'ratio':>6} |")
    print(f"| {'-' * 6}: | {'-' * 20} | {'-' * 7}: | {'-' * 5}: | {'-' * 7}: | {'-' * 5}: |")
    figures: list[dict] = []
    for context in config.contexts:
        figures += _time_context(decoders, context, config)
    if config.plot:
        plot(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0


def _time_context(decoders: dict[str, Decoder], context: int, config: Config) -> list[dict]:
    """Times the patterns in turns, prints their rows and returns their figures."""
    calls = {pattern: each.call(config.batch, context, config.tokens) for pattern, each in decoders.items()}
    times = turns.time_in_turns(calls, config.rounds, label=f"context {context}")
    # Rounds that a slow contender has left out are no comparison for the others: the machine may have changed since.
    shared = min(len(rounds) for rounds in times.values())
    figures: list[dict] = []
    for pattern, each in decoders.items():
        rounds = [ms / config.tokens for ms in times[pattern][:shared]]
        size, ms = cache_bytes(each.model, config.batch, context), statistics.median(rounds)
        row = {"context": context, "pattern": pattern, "bytes": size, "mib": size / 2**20, "ms": ms, "rounds": rounds}
        figures.append(row)
        print(
            f"| {context:>7} | {pattern:<20} | {row['mib']:8,.1f} | {size / figures[0]['bytes']:6.3f} "
            f"| {ms:8.1f} | {ms / figures[0]['ms']:6.2f} |",
            flush=True,
        )
    return figures


def plot(figures: list[dict], path: Path) -> None:
    """Draws cache and time against the context."""
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    picture = Figure(figsize=(5 * len(MEASURES), 3.6), layout="constrained")
    for axes, (label, measure) in zip(picture.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        curves: dict[str, dict[int, float]] = {}
        for figure in figures:
            curves.setdefault(figure["pattern"], {})[figure["context"]] = figure[measure]
        draw(axes, curves, title="decoding", xlabel="context, tokens", ylabel=label)
    picture.savefig(path, dpi=80)
