"""Rows of `bench peers` for operations: attention, long convolution, Monarch products, the two state-space operations.

Each side has its own layout, the one that it is fastest in; what a peer has no function for is written here in PyTorch,
as its users would write it. Both sides get the same numbers, and gradients go to every input.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

import m2
import ssm
from experiments.bench import scan
from experiments.bench.contenders import Call, Pass, Sizes, jax_passes, require, torch_passes
from experiments.bench.pairs import Pair, Row
from zoo.layers.softmax_attention import softmax_attention

Shape = tuple[int, int, int]


def rows(quick: bool) -> list[Row]:
    """The rows, at the sizes of the table or at those of a trial."""
    causal, both_ways = ((64,), (64,)) if quick else ((512, 2048, 4096), (128, 1024, 4096))
    out = [
        Row("attention", f"causal={causal_} l={l}", "torch sdpa", functools.partial(attention, l, causal_, heads))
        for causal_, lengths in ((True, causal), (False, both_ways))
        for l in lengths
        for heads in ((2,) if quick else (12,))
    ]
    for l in (64,) if quick else (512, 2048, 8192, 32768, 131072):
        d = 8 if quick else 256
        for peer, transposed in (("torch.fft", False), ("torch.fft, b l d", True)):
            out.append(Row("fft_conv", f"d={d} l={l}", peer, functools.partial(convolution, l, d, transposed)))
    factors: list[tuple[Shape, Shape]] = [((4, 8, 6), (4, 8, 8))]
    if not quick:
        factors = [((32, 32, 32), (32, 32, 32)), ((4, 768, 192), (4, 768, 768)), ((48, 16, 16), (48, 16, 16))]
    n_rows = 16 if quick else 2048
    for w1, w2 in factors:
        shape = "".join(f"({','.join(map(str, w))})" for w in (w1, w2))
        out.append(Row("monarch", shape, "torch bmm", functools.partial(monarch, w1, w2, n_rows)))
    block = 4 if quick else 192
    out.append(Row("monarch", f"4 blocks of {block}", "jax, dense", functools.partial(dense, block, n_rows)))
    l, e, h = (64, 16, 2) if quick else (2048, 1536, 24)
    out.append(Row("ssd", f"h={h} l={l}", "torch, chunk 64", functools.partial(dual, l, h, 8 if quick else 128)))
    for peer, build in (("mambapy pscan", scan.CONTENDERS["mambapy pscan"]), ("torch loop", torch_loop)):
        out.append(Row("selective_scan", f"e={e} l={l}", peer, functools.partial(selective, build, l, e)))
    return out


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _torch_pair(
    ours: Callable,
    theirs: Callable,
    inputs: Mapping[str, np.ndarray],
    dy: np.ndarray,
    to_theirs: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    to_ours: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    moved: Sequence[str] = (),
) -> Pair:
    """Both functions on the same inputs, given by name; those in `moved`, the output and dy have another layout."""
    import torch

    arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
    tensors = {
        name: torch.tensor(np.ascontiguousarray(to_theirs(x) if name in moved else x)).requires_grad_()
        for name, x in inputs.items()
    }
    other_dy = torch.tensor(np.ascontiguousarray(to_theirs(dy)))

    def gradients(found) -> list[np.ndarray]:
        by_name = dict(zip(tensors, (x.numpy() for x in found), strict=True))
        return [to_ours(by_name[name]) if name in moved else by_name[name] for name in sorted(by_name)]

    return Pair(
        jax_passes(lambda arrays: ours(**arrays), arrays, jnp.asarray(dy)),
        torch_passes(lambda: theirs(**tensors), tuple(tensors.values()), other_dy),
        {"forward": lambda y: [to_ours(y.detach().numpy())], "backward": gradients},
    )


def attention(l: int, causal: bool, heads: int) -> Pair:
    """Softmax attention, b l h p for ours and b h l p for PyTorch."""
    require("torch")
    import torch

    q, k, v, dy = (_normal(seed, 1, l, heads, 64) for seed in range(4))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    swap = lambda x: np.swapaxes(x, 1, 2)  # noqa: E731
    return _torch_pair(
        functools.partial(softmax_attention, causal=causal),
        lambda q, k, v: sdpa(q, k, v, is_causal=causal),
        {"q": q, "k": k, "v": v},
        dy,
        swap,
        swap,
        ("q", "k", "v"),
    )


def convolution(l: int, d: int, transposed: bool) -> Pair:
    """A causal convolution with filters as long as the sequence.

    Args:
      transposed: PyTorch's arrays are b l d, as ours, and it transposes; else they are b d l.
    """
    require("torch")
    import torch

    n = 2 * l

    def theirs(u, k):
        u = u.transpose(1, 2) if transposed else u
        y = torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(k, n), n)[..., :l]
        return y.transpose(1, 2).contiguous() if transposed else y

    swap = (lambda x: x) if transposed else (lambda x: np.swapaxes(x, 1, 2))
    inputs = {"u": _normal(0, 1, l, d), "k": _normal(1, d, l) / np.float32(l**0.5)}
    return _torch_pair(m2.fft_conv, theirs, inputs, _normal(2, 1, l, d), swap, swap, ("u",))


def monarch(w1: Shape, w2: Shape, n_rows: int) -> Pair:
    """A product with a Monarch matrix of two factors, (k, q, p) and (l, s, r), by batched products in PyTorch."""
    require("torch")
    import torch

    (k, q, p), (l, s, r) = w1, w2
    if l * r != k * q:
        raise ValueError(f"factors {w1} and {w2} do not fit, expected {k} * {q} = {l} * {r}")

    def theirs(x, w1, w2):
        a = torch.bmm(x.view(n_rows, k, p).transpose(0, 1), w1.transpose(1, 2))  # k rows q
        a = a.transpose(0, 1).reshape(n_rows, r, l).permute(2, 0, 1)  # l rows r
        return torch.bmm(a, w2.transpose(1, 2)).permute(1, 2, 0).reshape(n_rows, s * l)

    inputs = {"x": _normal(0, n_rows, k * p), "w1": _normal(1, *w1) / p**0.5, "w2": _normal(2, *w2) / r**0.5}
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    return _torch_pair(m2.monarch_matmul, theirs, inputs, _normal(3, n_rows, s * l))


def dense(block: int, n_rows: int) -> Pair:
    """A product with a Monarch matrix of 4 blocks, and one with a dense matrix of the same size; other numbers."""
    x, w, dense = _normal(0, n_rows, 4 * block), _normal(1, 4, block, block), _normal(2, 4 * block, 4 * block)
    dy = jnp.asarray(_normal(3, n_rows, 4 * block))
    factors = tuple(jnp.asarray(each) for each in (x, w, w.copy()))
    return Pair(
        jax_passes(lambda of: m2.monarch_matmul(*of), factors, dy),
        jax_passes(lambda of: of[0] @ of[1], (jnp.asarray(x), jnp.asarray(dense)), dy),
    )


def torch_dual(x, dt, A, B, C, chunk: int = 64):
    """The state-space dual in PyTorch: products within chunks, and a loop that carries the state from one to the next.

    Args:
      x: b l h p, dt: b l h, A: h, B and C: b l n, of one group; l a multiple of chunk.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
    """
    import torch

    b, l, h, p = x.shape
    c = l // chunk
    x = (x * dt[..., None]).view(b, c, chunk, h, p).permute(0, 3, 1, 2, 4)  # b h c q p
    decay = (dt * A).view(b, c, chunk, h).permute(0, 3, 1, 2).cumsum(-1)  # b h c q
    B, C = (w.view(b, 1, c, chunk, -1) for w in (B, C))
    below = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    inside = (decay[..., :, None] - decay[..., None, :]).masked_fill(~below, -torch.inf).exp()
    y = (inside * (C @ B.transpose(-1, -2))) @ x
    states = (B * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2) @ x  # b h c n p
    whole = decay[..., -1].exp()
    state, before = torch.zeros_like(states[:, :, 0]), []
    for i in range(c):
        before.append(state)
        state = whole[:, :, i, None, None] * state + states[:, :, i]
    y = y + (C @ torch.stack(before, 2)) * decay.exp()[..., None]
    return y.permute(0, 2, 3, 1, 4).reshape(b, l, h, p)


def dual(l: int, h: int, n: int) -> Pair:
    """The state-space dual with the inputs' scale of a fresh Mamba-2 layer."""
    require("torch")
    inputs = {
        "x": _normal(0, 1, l, h, 64),
        "dt": np.log1p(np.exp(_normal(1, 1, l, h) - 4)),
        "A": -np.linspace(1, 16, h, dtype=np.float32),
        "B": _normal(2, 1, l, n),
        "C": _normal(3, 1, l, n),
    }

    def ours(x, dt, A, B, C):
        return ssm.ssd(x, dt, A, B[:, :, None], C[:, :, None])[0]

    return _torch_pair(ours, torch_dual, inputs, _normal(4, 1, l, h, 64))


def torch_loop(sizes: Sizes) -> Mapping[Pass, Call]:
    """The selective scan in PyTorch, position after position."""
    require("torch")
    import torch

    arrays = scan.make_arrays(sizes)
    dy = torch.tensor(arrays.pop("dy"))
    inputs = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}

    def loop(u, delta, A, B, C, D):
        h, out = torch.zeros(u.shape[0], *A.shape), []
        for t in range(u.shape[1]):
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            out.append((h * C[:, t, None]).sum(-1))
        return torch.stack(out, 1) + D * u

    return torch_passes(lambda: loop(**inputs), tuple(inputs.values()), dy)


def selective(build, l: int, e: int) -> Pair:
    """`ssm.selective_scan` beside a contender of `bench scan`."""
    sizes = Sizes(1, l, e // 2, e, 16, 1, 256, 1)
    theirs = build(sizes)
    arrays = {name: jnp.asarray(x) for name, x in scan.make_arrays(sizes).items()}
    names = [name for name in arrays if name != "dy"]
    dy = arrays.pop("dy")

    def gradients(found):
        by_name = dict(zip(names, (x.numpy() for x in found), strict=True))
        return [by_name[name] for name in sorted(names)]

    ours = jax_passes(lambda arrays: ssm.selective_scan(**arrays)[0], arrays, dy)
    return Pair(ours, theirs, {"forward": lambda y: [y.detach().numpy()], "backward": gradients})
