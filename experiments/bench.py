"""How fast the operations are, side by side with what one would pick instead, in the same run.

    python -m experiments.bench                                    # selective_scan at (1, 2048, 1536, 16)
    python -m experiments.bench --lengths 1024 4096 --json out.json
    pip install mambapy torch && python -m experiments.bench       # with mambapy's parallel scan beside it

Contenders take turns, round after round, so that a machine that slows down slows all of them. Each figure is the median
of its rounds; what counts is the ratio to the first contender. Numbers say little without the hardware and the commit.
"""

import dataclasses
import functools
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import ssm
from experiments import flags
from ssm import reference


@dataclasses.dataclass(frozen=True)
class Config:
    """Which shapes to time, and how often."""

    lengths: tuple[int, ...] = (2048,)
    """Positions in a row."""
    batch: int = 1
    """Rows."""
    d_inner: int = 1536
    """Inner width; 1536 is that of mamba-130m."""
    d_state: int = 16
    """State size of a channel."""
    rounds: int = 7
    """Timed calls of each contender, after two that are not counted."""
    only: tuple[str, ...] = ()
    """Contenders to time, by a part of their names. Empty times all that are installed."""
    json: Path | None = None
    """File to write all figures to."""


Call = Callable[[], Any]


def selective_scan_contenders(arrays: dict[str, np.ndarray]) -> dict[str, tuple[Call, Call]]:
    """Name to (forward, forward + backward); the gradient is in every input."""
    inputs = {name: jnp.asarray(x) for name, x in arrays.items() if name != "dy"}
    dy = jnp.asarray(arrays["dy"])

    def jax_calls(scan):
        forward = jax.jit(lambda inputs: scan(**inputs)[0])
        both = jax.jit(lambda inputs, dy: jax.vjp(lambda inputs: scan(**inputs)[0], inputs)[1](dy))
        return (
            lambda: jax.block_until_ready(forward(inputs)),
            lambda: jax.block_until_ready(both(inputs, dy)),
        )

    contenders = {
        f"ssm.selective_scan {name}": jax_calls(functools.partial(ssm.selective_scan, implementation=name))
        for name in ("sequential", "associative")
    }
    contenders["lax.scan + autodiff"] = jax_calls(reference.selective_scan)
    contenders["lax.associative_scan + autodiff"] = jax_calls(_whole_associative_scan)
    if all(importlib.util.find_spec(name) for name in ("torch", "mambapy")):
        contenders["mambapy pscan"] = _pscan_calls(arrays)
    return contenders


def _whole_associative_scan(u, delta, A, B, C, D):
    """The recipe of most JAX ports: one associative scan over b l e n arrays."""
    a = jnp.exp(delta[..., None] * A)
    x = (delta * u)[..., None] * B[:, :, None]
    combine = lambda before, after: (after[0] * before[0], after[0] * before[1] + after[1])  # noqa: E731
    h = jax.lax.associative_scan(combine, (a, x), axis=1)[1]
    return jnp.einsum("blen,bln->ble", h, C) + D * u, h[:, -1]


def _pscan_calls(arrays):
    import torch
    from mambapy.pscan import pscan

    names = ("u", "delta", "A", "B", "C", "D")
    inputs = {name: torch.tensor(arrays[name]) for name in names}
    tracked = {name: torch.tensor(arrays[name], requires_grad=True) for name in names}
    dy = torch.tensor(arrays["dy"])

    def scan(u, delta, A, B, C, D):
        a = torch.exp(delta.unsqueeze(-1) * A)
        x = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        return (pscan(a, x) @ C.unsqueeze(-1)).squeeze(3) + D * u

    def forward():
        with torch.no_grad():
            return scan(**inputs)

    return forward, lambda: torch.autograd.grad(scan(**tracked), tuple(tracked.values()), dy)


def make_arrays(config: Config, length: int) -> dict[str, np.ndarray]:
    """Inputs at the scale of a fresh Mamba layer, and a cotangent."""
    rng = np.random.default_rng(0)
    b, e, n = config.batch, config.d_inner, config.d_state
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    return {
        "u": normal((b, length, e)),
        "delta": np.log1p(np.exp(normal((b, length, e)) - 4)),
        "A": -np.tile(np.arange(1, n + 1, dtype=np.float32), (e, 1)),
        "B": normal((b, length, n)),
        "C": normal((b, length, n)),
        "D": np.ones(e, np.float32),
        "dy": normal((b, length, e)),
    }


def time_in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; every round times every call once."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> int:
    """Times every contender and prints a table."""
    config = flags.parse_one(Config, prog="python -m experiments.bench", description=__doc__)
    device = jax.devices()[0]
    hardware = f"{device.device_kind} ({platform.machine()}), jax {jax.__version__}"
    print(f"selective_scan, float32, b={config.batch} e={config.d_inner} n={config.d_state}, {hardware}")
    print(f"\n| {'l':>6} | {'contender':<32} | {'pass':<18} | {'ms':>8} | {'ratio':>6} | {'tokens/s':>9} |")
    print(f"| {'-' * 5}: | {'-' * 32} | {'-' * 18} | {'-' * 7}: | {'-' * 5}: | {'-' * 8}: |")
    figures = []
    for length in config.lengths:
        contenders = selective_scan_contenders(make_arrays(config, length))
        names = [name for name in contenders if not config.only or any(part in name for part in config.only)]
        if not names:
            raise flags.UsageError(f"--only {' '.join(config.only)} matches none of: {', '.join(contenders)}")
        for index, which in enumerate(("forward", "forward + backward")):
            times = time_in_turns({name: contenders[name][index] for name in names}, config.rounds)
            first = statistics.median(times[names[0]])
            for name in names:
                ms = statistics.median(times[name])
                speed = 1e3 * config.batch * length / ms
                print(f"| {length:>6} | {name:<32} | {which:<18} | {ms:8.1f} | {ms / first:6.2f} | {speed:9,.0f} |")
                figures.append({"length": length, "contender": name, "pass": which, "ms": times[name]})
    if config.json:
        record = {"config": dataclasses.asdict(config) | {"json": None}, "hardware": hardware, "figures": figures}
        config.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    flags.run(main)
