"""A trained model's maps as products of smaller ones, which are chosen by what the maps read.

    small = zoo.factorize(model, batches, head_dim=32)      queries and keys, values and outputs: by their products
    small = zoo.factorize(model, batches, n_blocks=8)       dense channel mixers -> Monarch matrices of two factors
    small = zoo.factorize(model, batches, d_ff=1024)        hidden channels, as `zoo.prune`: what Nystrom's method is

What matters of a map is what it does to inputs that there are: with H = C C^T, their second moments, an approximation
is best by the Frobenius norm of (W - W') C. So where inputs lie in fewer directions than a factor has, nothing is lost.
The result is an ordinary model; there is no training.

    queries, keys      C^T W_q W_k^T C       = U S V^T,     W_k' = C^-T V,  W_q' = C^-T U S         a head of keys each
    values, output     C^T W_v [W_o ...]     = U S V^T,     W_v' = C^-T U,  W_o' = S V^T

What a rotary embedding turns is no product: of queries and keys those pairs of channels stay that are largest, by the
root of E |q|^2 E |k|^2 over the pair, each with the frequency that it has.

Source: Lin et al. 2024, arXiv:2408.09632, section 3 (MoDeGPT: pairs of maps by their products, weighted by what they
read); Dao et al. 2022, arXiv:2204.00595, section 3.2 (Monarch projection), here under the moments of each input block.

Axes: i inputs, o outputs, p width of a head, g query heads of a head of keys, k blocks.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m2 import MonarchMLPConfig, project_to_monarch
from zoo.layers.attention import Attention
from zoo.layers.mlp import MLP
from zoo.models.build import Model, abstract
from zoo.reuse.calibration import Moments, calibrate
from zoo.reuse.grow import SAID_IN_WORDS, filled, pattern_of, require_language
from zoo.reuse.importance import largest
from zoo.reuse.prune import prune
from zoo.reuse.widths import Path
from zoo.stack.pattern import parse_pattern


def factorize(
    model: Model,
    calibration: Iterable[Mapping[str, Array]],
    *,
    head_dim: int | None = None,
    n_blocks: int | None = None,
    d_ff: int | None = None,
    weighed: bool = True,
) -> Model:
    """A model with smaller factors in place of some of its maps.

    Args:
      model: with attention without biases and convolution for `head_dim`; with dense channel mixers whose first maps
        have no bias for `n_blocks`.
      calibration: batches as `calibrate` takes them.
      head_dim: width of attention's heads; of what is rotated of them, as large a share stays.
      n_blocks: k, blocks of each factor of the Monarch matrices that channel mixers become; divides d_model and d_ff.
      d_ff: hidden channels of channel mixers, before they become Monarch matrices.
      weighed: whether it counts what the maps read. False: every direction as much, for comparison.

    Returns:
      A model of the same kind, with arrays of its own.

    Raises:
      ValueError: nothing asked for; a model whose maps are not of that kind; widths that do not divide, or grow.

    Examples:
      >>> attn = zoo.AttentionConfig(n_heads=2)
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="attn/mlp", attn=attn)
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> smaller = zoo.factorize(model, [{"ids": jnp.arange(24).reshape(2, 12)}], n_blocks=4)
      >>> smaller.config.pattern
      'attn/monarch*2'
    """
    if head_dim is None and n_blocks is None and d_ff is None:
        raise ValueError("expected one of head_dim, n_blocks and d_ff")
    require_language(model)
    batches = [dict(batch) for batch in calibration]
    if d_ff is not None:
        model = prune(model, batches, d_ff=d_ff, compensate=weighed)

    def moments(model: Model) -> Moments:
        found = calibrate(model, batches)
        return (
            found if weighed else {name: jnp.broadcast_to(jnp.eye(H.shape[-1]), H.shape) for name, H in found.items()}
        )

    if head_dim is not None:
        model = _with_head_dim(model, moments(model), head_dim)
    return model if n_blocks is None else _with_monarch(model, moments(model), n_blocks)


def square_root(
    moment: Float[np.ndarray, "i i"],
) -> tuple[Float[np.ndarray, "i i"], Float[np.ndarray, "i i"]]:
    """(C, C^-1) of H = C C, symmetric; directions that do not come are zero in both."""
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    # Moments are sums in float32: what is below their rounding is nothing.
    there = values > 1e-6 * max(float(values[-1]), 1e-30)
    root = np.sqrt(np.where(there, values, 0))
    inverse = np.where(there, 1 / np.where(there, root, 1), 0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def monarch_of(
    weight: Float[np.ndarray, "i o"], moment: Float[np.ndarray, "i i"], n_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (w1, w2) of the Monarch matrix that gives nearly what a dense map gives on what that reads.

    Each block of inputs is weighed by its own moments, so that their root goes into the block of w1, and the closest
    Monarch matrix is exact for what is left; then w2 is refitted to what w1 gives, under all moments.

    Args:
      weight: W.
      moment: H.
      n_blocks: k, of both factors.
    """
    d_in, d_out = weight.shape
    each = d_in // n_blocks
    H, W = np.asarray(moment, np.float64), np.asarray(weight, np.float64)
    roots = [square_root(H[b * each : (b + 1) * each, b * each : (b + 1) * each]) for b in range(n_blocks)]
    weighed = np.concatenate([C @ W[b * each : (b + 1) * each] for b, (C, _) in enumerate(roots)]).T
    hidden = n_blocks * min(each, d_out // n_blocks)
    w1, w2 = (np.asarray(w, np.float64) for w in project_to_monarch(jnp.asarray(weighed), n_blocks, hidden=hidden))
    w1 = np.stack([block @ inverse for block, (_, inverse) in zip(w1, roots, strict=True)])  # k q p

    # What w1 gives, in the order in which w2 reads it, and that for which each output is the best sum.
    first = np.zeros((hidden, d_in))
    for b, block in enumerate(w1):
        first[b * len(block) : (b + 1) * len(block), b * each : (b + 1) * each] = block
    between, refitted = first @ H @ first.T, []
    aimed = first @ H @ W  # hidden o
    for number, now in enumerate(w2):
        read, written = np.arange(number, hidden, n_blocks), np.arange(number, d_out, n_blocks)
        within = between[np.ix_(read, read)]
        damping = 1e-7 * max(float(np.mean(np.diagonal(within))), 1e-30)
        target = aimed[np.ix_(read, written)] + damping * now.T
        refitted.append(np.linalg.solve(within + damping * np.eye(len(read)), target).T)
    return w1, np.stack(refitted)


def _with_head_dim(model: Any, moments: Moments, head_dim: int) -> Any:
    config = model.config
    if said := SAID_IN_WORDS.search(config.pattern):
        raise ValueError(f"pattern={config.pattern!r} says {said[0]}, a width: it would stay")
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    values, options = dict(params), None
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Attention):
            continue
        turned = _require_plain(module, head_dim)
        scale = module.config.softmax_scale or module.head_dim**-0.5
        heads: dict[str, Any] = {"n_heads": module.n_heads, "n_kv_heads": module.n_kv_heads}
        if turned:
            heads |= {"rope_dim": turned, "rope_pairs": module.config.rope_pairs or module.rope_dim // 2}
        options = dataclasses.replace(config.attn, head_dim=head_dim, softmax_scale=scale, **heads)
        moment = moments[".".join(map(str, (*path, "q_proj", "kernel")))]
        for name, value in _narrow_heads(module, moment, head_dim, turned).items():
            of = params[(*path, "q_proj", "kernel")]
            values[(*path, *name.split("."))] = jnp.asarray(value, of.dtype)
    if options is None:
        raise ValueError(f"head_dim={head_dim}, but pattern={config.pattern!r} has no attention")
    return filled(abstract(dataclasses.replace(config, attn=options)), values, model)


def _require_plain(module: Attention, head_dim: int) -> int:
    """How many channels of a narrower head are rotated."""
    of = module.config
    if not 0 < head_dim <= module.head_dim:
        raise ValueError(f"head_dim={head_dim}, expected 1 to the model's {module.head_dim}")
    for name, plain in (("bias", False), ("d_conv", None), ("qk_norm", False)):
        if getattr(of, name) != plain:
            raise ValueError(
                f"head_dim with attention of {name}={getattr(of, name)!r}, expected {plain!r}: "
                "queries and keys are not a product of their maps there"
            )
    if of.position != "rope":
        return 0
    turned = head_dim * module.rope_dim / module.head_dim
    if turned % 2:
        raise ValueError(
            f"head_dim={head_dim}, of which {turned:g} channels would be rotated as {module.rope_dim} of "
            f"{module.head_dim} are, expected an even number"
        )
    return int(turned)


def _narrow_heads(module: Attention, moment: Array, head_dim: int, turned: int) -> dict[str, np.ndarray]:
    """The parameters of attention whose heads are narrower, the first `turned` channels of each rotated."""
    C, inverse = square_root(np.asarray(moment))
    groups, p = module.n_kv_heads, module.head_dim
    g, was_turned = module.n_heads // groups, module.rope_dim if turned else 0
    W = {name: np.asarray(getattr(module, name).kernel[...], np.float64) for name in ("q_proj", "k_proj", "v_proj")}
    q, k, v = (W[name].reshape(len(C), groups, -1, p) for name in W)  # i groups g p, of keys and values one
    o = np.asarray(module.o_proj.kernel[...], np.float64).reshape(groups, g * p, -1)
    out: dict[str, list[np.ndarray]] = {f"{name}_proj.kernel": [] for name in "qkvo"}
    indices = []
    for group in range(groups):
        kept = _largest_pairs(C, q[:, group], k[:, group], was_turned, turned, module.config.rope_interleaved)
        if turned:
            now = np.arange(was_turned // 2) if module.rope_index is None else np.asarray(module.rope_index[...])[group]
            indices.append(now[kept.pairs])
        q_turned, k_turned = q[:, group][..., kept.channels], k[:, group, 0][:, kept.channels]
        q_rest, k_rest = q[:, group, :, was_turned:], k[:, group, 0, was_turned:]
        both = np.concatenate([C @ q_rest[:, h] @ (C @ k_rest).T for h in range(g)])
        U, S, Vh = _truncated(both, head_dim - turned)
        out["k_proj.kernel"].append(np.concatenate([k_turned, inverse @ Vh.T], axis=1))
        for h in range(g):
            rest = inverse @ (U[h * len(C) : (h + 1) * len(C)] * S)
            out["q_proj.kernel"].append(np.concatenate([q_turned[:, h], rest], axis=1))
        outputs = o[group].reshape(g, p, -1)
        U, S, Vh = _truncated(C @ v[:, group, 0] @ np.concatenate(list(outputs), axis=1), head_dim)
        out["v_proj.kernel"].append(inverse @ U)
        out["o_proj.kernel"] += [S[:, None] * part for part in np.split(Vh, g, axis=1)]
    found = {name: np.concatenate(parts, axis=0 if name[0] == "o" else 1) for name, parts in out.items()}
    return found | ({"rope_index": np.stack(indices)} if turned else {})


class _Kept(NamedTuple):
    pairs: np.ndarray
    channels: np.ndarray
    """Those of the pairs, as the narrower head has them."""


def _largest_pairs(
    C: np.ndarray, q: np.ndarray, k: np.ndarray, was_turned: int, turned: int, interleaved: bool
) -> _Kept:
    """The pairs of rotated channels that stay, in order: C i i, q i g p, k i 1 p."""
    numbered = np.arange(was_turned)
    of_pair = numbered.reshape(-1, 2) if interleaved else numbered.reshape(2, -1).T  # f 2
    energy = [np.square(np.einsum("ij,jhp->ihp", C, part)).sum((0, 1))[of_pair].sum(1) for part in (q, k)]
    pairs = largest(np.sqrt(energy[0] * energy[1]), turned // 2) if turned else np.arange(0)
    kept = of_pair[pairs]
    return _Kept(pairs, kept.ravel() if interleaved else kept.T.ravel())


def _truncated(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values and their vectors, filled up with zeros where there are fewer."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    missing = max(0, rank - len(S))
    U, S, Vh = np.pad(U, ((0, 0), (0, missing))), np.pad(S, (0, missing)), np.pad(Vh, ((0, missing), (0, 0)))
    return U[:, :rank], S[:rank], Vh[:rank]


def _with_monarch(model: Any, moments: Moments, n_blocks: int) -> Any:
    config = model.config
    words = parse_pattern(config.pattern, config.n_layers)
    channels = {word.channel for word in words if word.channel}
    if channels != {"mlp"}:
        raise ValueError(f"n_blocks={n_blocks} with pattern={config.pattern!r}, expected mlp as its only channel mixer")
    params = dict(nnx.to_flat_state(nnx.state(model)))
    values: dict[Path, Array] = {path: param[...] for path, param in params.items()}
    options = None
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, MLP):
            continue
        kernels = [m for m in (module.gate_proj, module.up_proj) if m is not None]
        if kernels[0].bias is not None:
            raise ValueError("n_blocks with bias=True: the first maps of Monarch channel mixers have none")
        dims = {"d_model": kernels[0].kernel.shape[0], "d_ff": module.d_ff}
        for name, width in dims.items():
            if n_blocks < 1 or width % n_blocks:
                raise ValueError(f"n_blocks={n_blocks} must divide {name}={width}")
        of, bias = config.mlp, module.down_proj.bias
        if (of.gate_multiplier, of.out_multiplier, of.series) != (1.0, 1.0, 1):
            raise ValueError(
                "n_blocks with gate_multiplier, out_multiplier or series, expected 1: Monarch mixers have none"
            )
        options = MonarchMLPConfig(
            d_ff=module.d_ff,
            gated=of.gated,
            n_blocks=n_blocks,
            order=2,
            activation=of.activation,
            bias=bias is not None,
        )
        for new, old in (("gated_layers", kernels), ("wo", [module.down_proj])):
            names = [(*path, name) for name in _names(module, old)]
            moment = moments[".".join(map(str, (*names[0], "kernel")))]
            weight = np.concatenate([np.asarray(m.kernel[...]) for m in old], axis=1)
            w1, w2 = monarch_of(weight, np.asarray(moment), n_blocks)
            dtype = old[0].kernel[...].dtype
            values |= {(*path, new, "w1"): jnp.asarray(w1, dtype), (*path, new, "w2"): jnp.asarray(w2, dtype)}
        if bias is not None:
            values[(*path, "wo", "bias")] = bias[...]
    pattern = pattern_of(tuple(word._replace(channel=word.channel and "monarch") for word in words), config.pattern)
    target = abstract(dataclasses.replace(config, pattern=pattern, monarch=options))
    return filled(target, values, model)


def _names(module: MLP, maps: list[Any]) -> list[str]:
    return [name for name in ("gate_proj", "up_proj", "down_proj") if any(getattr(module, name) is m for m in maps)]
