"""What the machine can do, and how much of it each operation uses, in the same run.

    python -m experiments.bench limits                                     # two minutes on one core
    python -m experiments.bench limits --only attention ssd --json out.json
    python -m experiments.bench limits --quick                             # tiny sizes: whether all of it runs

Ceilings: products of square float32 matrices, GFLOP/s; copies between two arrays that fit the second-level cache, and
between two that do not, GB/s of reading and writing; exponentials of an array in the cache, 1e9/s; real FFTs of many
short rows and of a few long ones, GFLOP/s at 2.5 n log2 n each. By XLA (copies: numpy) and, where it is installed, by
torch; the fastest is the ceiling.

An operation's count is the work that its formula asks for, whatever an implementation does: FLOPs in products (a
multiplication and an addition are two), FLOPs in FFTs by the formula above, exponentials, and bytes: inputs and outputs
once. Each part over its ceiling is a time; the longest is the limit, for parts may overlap, and the share is the limit
over the time that was measured. Operations and ceilings take turns, round after round; an operation's time is the
median, a ceiling the best round.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import m2
import ssm
from experiments.bench import record, scan, turns
from experiments.bench.contenders import Call, JaxCall, Sizes, TorchCall
from experiments.bench.cores import use_cores
from experiments.loop import flags
from zoo.layers.linear import linear
from zoo.layers.softmax_attention import softmax_attention

# Part of a count -> its unit, what 1e9 of it a second is called.
PARTS = {
    "product": "GFLOP/s of products",
    "fft": "GFLOP/s of FFTs",
    "exp": "1e9 exponentials/s",
    "bytes": "GB/s, in memory",
    "bytes in cache": "GB/s, in cache",
}
# Bytes of inputs and outputs up to which a copy between them counts as one in the cache.
CACHE_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often."""

    only: tuple[str, ...] = ()
    """Operations to time, by a part of their names. Empty times all; ceilings are always measured."""
    threads: int = 1
    """Cores that may be used."""
    rounds: int = 5
    """Timed calls of each, after two that are not counted; 3 at most for calls of 2 seconds and more."""
    quick: bool = False
    """Tiny sizes, to see whether everything runs; the figures mean nothing."""
    json: Path | None = None
    """File to write all figures to: every time of every round, the hardware and the versions."""

    def __post_init__(self):
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")


class Ceiling(NamedTuple):
    """One way to reach a ceiling: a call that does so much of a part."""

    part: str
    name: str
    amount: float
    call: Call


class Operation(NamedTuple):
    """An operation at its sizes, and what its formula asks for by part: FLOPs, exponentials, bytes."""

    name: str
    shape: str
    counts: dict[str, float]
    build: Callable[[], Call]


def fft_flops(n: int) -> float:
    """FLOPs of one real FFT of n points, as they are customarily counted."""
    return 2.5 * n * math.log2(n)


def ceilings(quick: bool) -> list[Ceiling]:
    """Ways to reach each ceiling."""
    n, in_cache, in_memory = (64, 2**12, 2**14) if quick else (2048, 2**16, 2**26)  # matrix rows; floats
    lengths = ((4, 64),) if quick else ((1024, 1024), (16, 2**16))
    a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    floats = np.linspace(-4, 0, in_cache, dtype=np.float32)
    on_device = jnp.asarray(floats)
    times = 2 if quick else 64  # or starting a call would count
    found = [
        Ceiling("product", f"XLA, {n} x {n}", 2 * n**3, JaxCall(jnp.dot, jnp.asarray(a), jnp.asarray(a))),
        Ceiling("exp", "XLA", times * in_cache, JaxCall(lambda x: _repeated_exp(x, times), on_device)),
    ]
    for part, size in (("bytes in cache", in_cache), ("bytes", in_memory)):
        found.append(_copy(part, size, times if size == in_cache else 1))
    for rows, length in lengths:
        x = np.random.default_rng(0).standard_normal((rows, length), dtype=np.float32)
        name, amount = f"{rows} x {length}", rows * fft_flops(length)
        found.append(Ceiling("fft", f"XLA, {name}", amount, JaxCall(jnp.fft.rfft, jnp.asarray(x))))
        found += _with_torch("fft", f"torch, {name}", amount, x, lambda torch, x: torch.fft.rfft(x))
    found += _with_torch("product", f"torch, {n} x {n}", 2 * n**3, a, lambda torch, x: x @ x)
    found += _with_torch(
        "exp", "torch", times * in_cache, floats, lambda torch, x: [torch.exp(x) for _ in range(times)]
    )
    return found


def _repeated_exp(x, times: int):
    """Exponentials whose results are the next ones' arguments, so that none can be left out; they stay within 1."""
    return jax.lax.fori_loop(0, times, lambda _, x: jnp.exp(-x), x)


def _copy(part: str, size: int, times: int) -> Ceiling:
    """Copies of so many floats into an array that is there: the memory's speed, not that of getting new pages."""
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)

    def call():
        for _ in range(times):
            np.copyto(target, source)
        return target[:1]

    return Ceiling(part, f"numpy, {4 * size / 2**20:g} MiB", 2 * 4 * size * times, call)


def _with_torch(part: str, name: str, amount: float, x: np.ndarray, function) -> list[Ceiling]:
    if not find_spec("torch"):
        return []
    import torch

    tensor = torch.tensor(x)
    return [Ceiling(part, name, amount, TorchCall(torch.no_grad()(lambda: function(torch, tensor))))]


def operations(quick: bool) -> list[Operation]:
    """The operations, forward, at the sizes of `bench peers` or at those of a trial."""
    l, d = (32, 16) if quick else (2048, 768)
    h, p, n = max(1, d // 64), min(d, 64), 8 if quick else 128
    blocks = (2, 4) if quick else (4, 32, 48)
    found = [_attention(l, h, p, causal) for causal in (True, False)]
    found += [_linear(l, d), _convolution(l, d), _convolution(8 * l, max(1, d // 4))]
    found += [_monarch(l, k, d // k) for k in blocks if d % k == 0]
    return [*found, _scan(l, 2 * d), _dual(l, 2 * h, p, n), _short_convolution(l, 2 * d)]


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32))


def _bytes(floats: int) -> dict[str, float]:
    return {"bytes in cache" if 4 * floats <= CACHE_BYTES else "bytes": 4.0 * floats}


def _attention(l: int, h: int, p: int, causal: bool) -> Operation:
    """Scores and their product with the values, for the pairs that are seen, and an exponential for each."""
    pairs = h * (l * (l + 1) // 2 if causal else l * l)
    counts = {"product": 4.0 * pairs * p, "exp": float(pairs), **_bytes(4 * l * h * p)}
    run = lambda x: softmax_attention(x, x, x, causal=causal)  # noqa: E731
    name = "attention, causal" if causal else "attention"
    return Operation(name, f"l={l} h={h} p={p}", counts, lambda: JaxCall(run, _random(1, l, h, p)))


def _linear(l: int, d: int) -> Operation:
    counts = {"product": 2.0 * l * d * d, **_bytes(2 * l * d + d * d)}

    def build():
        graphdef, params = nnx.split(linear(d, d, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
        return JaxCall(lambda params, x: nnx.merge(graphdef, params)(x), params, _random(1, l, d))

    return Operation("linear", f"l={l} d={d}", counts, build)


def _convolution(l: int, d: int) -> Operation:
    """Three transforms of twice the length for each channel, and a complex product between them."""
    counts = {"fft": d * 3 * fft_flops(2 * l), "product": d * 6.0 * l, **_bytes(3 * l * d)}
    return Operation("fft_conv", f"l={l} d={d}", counts, lambda: JaxCall(m2.fft_conv, _random(1, l, d), _random(d, l)))


def _monarch(rows: int, k: int, width: int) -> Operation:
    counts = {"product": 4.0 * rows * k * width**2, **_bytes(2 * rows * k * width + 2 * k * width**2)}
    return Operation(
        "monarch_matmul",
        f"{k} blocks of {width}, {rows} rows",
        counts,
        lambda: JaxCall(m2.monarch_matmul, _random(rows, k * width), *(_random(k, width, width) for _ in range(2))),
    )


def _scan(l: int, e: int, n: int = 16) -> Operation:
    """exp(delta A) for each channel and state, a step of three multiplications and two additions, and the skip.

    They are no products that a matrix unit could do, so its ceiling is out of reach; exponentials or memory are nearer.
    """
    counts = {"product": l * e * (6.0 * n + 3), "exp": float(l * e * n), **_bytes(3 * l * e + 2 * l * n)}

    def build():
        arrays = {name: jnp.asarray(x) for name, x in scan.make_arrays(Sizes(1, l, e // 2, e, n, 1, 1, 1)).items()}
        arrays.pop("dy")
        return JaxCall(lambda arrays: ssm.selective_scan(**arrays)[0], arrays)

    return Operation("selective_scan", f"l={l} e={e} n={n}", counts, build)


def _dual(l: int, h: int, p: int, n: int, chunk: int = 64) -> Operation:
    """Scores once for all heads and their product with x, the lower halves in chunks of 64, and both state products."""
    pairs = l * (chunk + 1) // 2
    counts = {
        "product": 2.0 * pairs * n + 2.0 * pairs * h * p + 4.0 * l * h * p * n,
        "exp": float(pairs * h + 2 * l * h),
        **_bytes(2 * l * h * p + l * h + 2 * l * n),
    }

    def build():
        x, dt, A = _random(1, l, h, p), jax.nn.softplus(_random(1, l, h) - 4), -jnp.arange(1.0, h + 1)
        B, C = _random(1, l, 1, n), _random(1, l, 1, n) + 0.5
        return JaxCall(lambda *arrays: ssm.ssd(*arrays)[0], x, dt, A, B, C)

    return Operation("ssd", f"l={l} h={h} p={p} n={n}", counts, build)


def _short_convolution(l: int, e: int, w: int = 4) -> Operation:
    counts = {"product": 2.0 * l * e * w, **_bytes(2 * l * e + e * w)}
    run = lambda x, weight: ssm.causal_conv1d(x, weight)[0]  # noqa: E731
    return Operation(
        "causal_conv1d", f"l={l} e={e} w={w}", counts, lambda: JaxCall(run, _random(1, l, e), _random(e, w))
    )


def limit(counts: dict[str, float], reached: dict[str, float]) -> tuple[str, float]:
    """The part that takes longest at its ceiling, and that time in ms.

    Args:
      counts: amounts by part.
      reached: the ceilings by part, a second.
    """
    times = {part: 1e3 * amount / reached[part] for part, amount in counts.items()}
    longest = max(times, key=lambda part: times[part])
    return longest, times[longest]


def main() -> int:
    """Measures the ceilings and the operations, and prints two tables."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench limits", description=__doc__)
        chosen = [op for op in operations(config.quick) if not config.only or any(p in op.name for p in config.only)]
        if not chosen:
            names = ", ".join(dict.fromkeys(op.name for op in operations(config.quick)))
            raise ValueError(f"--only {' '.join(config.only)} matches none of: {names}")
        cores = use_cores(config.threads)
    with cores:
        return _measure(chosen, config)


def _measure(chosen: list[Operation], config: Config) -> int:
    environment = record.read_environment()
    print(record.machine_and_versions(environment))
    print(f"float32, {config.threads} threads, {config.rounds} rounds, commit {environment['commit']}")
    tried = ceilings(config.quick)
    calls = {f"{each.part}: {each.name}": each.call for each in tried}
    calls |= {f"{op.name} {op.shape}": op.build() for op in chosen}
    times = turns.time_in_turns(calls, config.rounds)
    rates = {f"{each.part}: {each.name}": 1e3 * each.amount / min(times[f"{each.part}: {each.name}"]) for each in tried}
    reached = {part: max(rate for name, rate in rates.items() if name.startswith(f"{part}: ")) for part in PARTS}
    figures: list[dict] = []
    print(f"\n| {'ceiling':<20} | {'by':<20} | {'1e9/s':>8} |\n| {'-' * 20} | {'-' * 20} | {'-' * 7}: |")
    for each in tried:
        name = f"{each.part}: {each.name}"
        print(f"| {PARTS[each.part]:<20} | {each.name:<20} | {rates[name] / 1e9:8.4g} |")
        figures.append({"ceiling": each.part, "by": each.name, "per_second": rates[name], "ms": times[name]})
    print(
        f"\n| {'operation':<18} | {'shape':<28} | {'ms':>8} | {'limit ms':>8} | {'by':<14} | {'share':>6} |"
        f"\n| {'-' * 18} | {'-' * 28} | {'-' * 7}: | {'-' * 7}: | {'-' * 14} | {'-' * 5}: |"
    )
    for op in chosen:
        took = times[f"{op.name} {op.shape}"]
        part, least = limit(op.counts, reached)
        ms = statistics.median(took)
        print(f"| {op.name:<18} | {op.shape:<28} | {ms:8.3g} | {least:8.3g} | {part:<14} | {least / ms:6.0%} |")
        row = {"operation": op.name, "shape": op.shape, "ms": took, "counts": op.counts, "limit_ms": least}
        figures.append({**row, "by": part, "share": least / ms})
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0
