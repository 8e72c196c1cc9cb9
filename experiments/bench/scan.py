"""Contenders of `bench scan`: ours, the recipes of most JAX ports, and mambapy's parallel scan."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import ssm
from experiments.bench.contenders import Call, Contender, Pass, Sizes, jax_passes, require, torch_passes
from ssm import reference


def make_arrays(sizes: Sizes) -> dict[str, np.ndarray]:
    """Inputs at the scale of a fresh Mamba layer, and a cotangent."""
    rng = np.random.default_rng(0)
    b, l, e, n = sizes.batch, sizes.length, sizes.d_inner, sizes.d_state
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    return {
        "u": normal((b, l, e)),
        "delta": np.log1p(np.exp(normal((b, l, e)) - 4)),
        "A": -np.tile(np.arange(1, n + 1, dtype=np.float32), (e, 1)),
        "B": normal((b, l, n)),
        "C": normal((b, l, n)),
        "D": np.ones(e, np.float32),
        "dy": normal((b, l, e)),
    }


def _jax_contender(scan) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        inputs = {name: jnp.asarray(x) for name, x in make_arrays(sizes).items()}
        dy = inputs.pop("dy")
        return jax_passes(lambda inputs: scan(**inputs)[0], inputs, dy)

    return build


def _whole_associative_scan(u, delta, A, B, C, D):
    """The recipe of most JAX ports: one associative scan over b l e n arrays."""
    a = jnp.exp(delta[..., None] * A)
    x = (delta * u)[..., None] * B[:, :, None]
    combine = lambda before, after: (after[0] * before[0], after[0] * before[1] + after[1])  # noqa: E731
    h = jax.lax.associative_scan(combine, (a, x), axis=1)[1]
    return jnp.einsum("blen,bln->ble", h, C) + D * u, h[:, -1]


def _pscan(sizes: Sizes) -> dict[Pass, Call]:
    require("torch", "mambapy")
    import torch
    from mambapy.pscan import pscan

    arrays = make_arrays(sizes)
    dy = torch.tensor(arrays.pop("dy"))
    inputs = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}

    def scan(u, delta, A, B, C, D):
        a = torch.exp(delta.unsqueeze(-1) * A)
        x = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        return (pscan(a, x) @ C.unsqueeze(-1)).squeeze(3) + D * u

    return torch_passes(lambda: scan(**inputs), tuple(inputs.values()), dy)


CONTENDERS: Mapping[str, Contender] = {
    "ssm.selective_scan sequential": _jax_contender(functools.partial(ssm.selective_scan, implementation="sequential")),
    "ssm.selective_scan associative": _jax_contender(
        functools.partial(ssm.selective_scan, implementation="associative")
    ),
    "lax.scan + autodiff": _jax_contender(reference.selective_scan),
    "lax.associative_scan + autodiff": _jax_contender(_whole_associative_scan),
    "mambapy pscan": _pscan,
}
