"""Rows cut over eight simulated devices against one device; run by `test_sequence_cut.py` in processes of their own.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.zoo.cut_cases "ssd packed"   # names begin so

Values and every gradient in float64, where agreement can be asked for to 1e-10.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import m2
import ssm
import zoo
from tests.numerics import with_random_parameters
from zoo.layers.seen import Positions
from zoo.layers.softmax_attention import softmax_attention

TOLERANCE = 1e-10
AXES = ("data", "fsdp", "sequence", "tensor", "expert")
numbers = np.random.default_rng(0)


def on(**sizes):
    """The mesh with these axes, the others of size 1."""
    return jax.make_mesh([sizes.get(axis, 1) for axis in AXES], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def normal(*shape):
    return jnp.asarray(numbers.standard_normal(shape))


def positive(*shape):
    return jax.nn.softplus(normal(*shape))


def differences(function, arrays, mesh):
    """The largest relative error among outputs and gradients of a scalar of them, and the compiled program's text."""
    weights = jax.tree.map(lambda x: normal(*x.shape), jax.eval_shape(function, *arrays))
    leaves, tree = jax.tree.flatten(arrays)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def scalar(values):
        filled = list(leaves)
        for i, value in zip(floats, values, strict=True):
            filled[i] = value
        out = function(*jax.tree.unflatten(tree, filled))
        return sum(jnp.sum(w * y) for w, y in zip(jax.tree.leaves(weights), jax.tree.leaves(out), strict=True)), out

    def run():
        values = [leaves[i] for i in floats]
        compiled = jax.jit(jax.grad(scalar, has_aux=True)).lower(values).compile()
        return jax.tree.leaves(compiled(values)), compiled.as_text()

    one, _ = run()
    with jax.set_mesh(mesh):
        many, text = run()
    pairs = zip(one, many, strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(a)) + 1e-300)) for a, b in pairs if a.size), text


def packed(b, length):
    """Documents of which one begins exactly where a device's piece does, and ids that come back."""
    ids = np.sort(numbers.integers(0, 5, (b, length)), axis=1)
    ids[1] = np.arange(length) * 4 // length % 2
    return jnp.asarray(ids, jnp.int32)


def positions(kind, b, length):
    """(mask, segment_ids)"""
    mask = jnp.arange(length) < jnp.asarray([length - length // 3, length])[:, None]
    if kind == "gaps":
        mask = jnp.asarray(numbers.random((b, length)) < 0.4).at[0, length // 4 : length // 2 + 1].set(False)
    ids = packed(b, length)
    if kind == "twos":
        ids = ids.at[0].set(jnp.arange(length, dtype=jnp.int32) // 2 % 2)
    return {"plain": (None, None), "packed": (None, ids), "twos": (None, ids), "masked": (mask, None)}.get(
        kind, (mask, ids)
    )


def operations(kind, length):
    """name -> (function, arrays) of every operation along positions."""
    b, e, n, h, p, g, r = 2, 6, 3, 8, 5, 2, 2
    mask, ids = positions(kind, b, length)
    given = {"mask": mask, "segment_ids": ids}
    rates, few = -jnp.exp(normal(h)), {"chunk_size": 4}
    at = None
    if mask is not None or ids is not None:
        there = jnp.ones((b, length), bool) if mask is None else mask
        index = jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
        at = Positions(index, ids), Positions(jnp.where(there, index, -1), ids)

    def attention(heads, causal, window):
        def attend(q, k, v):
            options = {"slopes": jnp.arange(heads) / heads, "block_size": 8, "implementation": "blocks"}
            return softmax_attention(q, k, v, *(at or ()), causal=causal, window=window, **options)

        kv = heads // 3 if heads % 3 == 0 else 2
        return attend, (normal(b, length, heads, 4), normal(b, length, kv, 4), normal(b, length, kv, 4))

    def convolve(causal, taps):
        def run(u, k, bias, one, other):
            return m2.fft_conv(u, k, bias=bias, input_gate=one, output_gate=other, causal=causal, **given)

        return run, (normal(b, length, e), normal(e, taps), normal(e), normal(b, length, e), normal(b, length, e))

    trapezoid = (normal(b, length, r, h, p), normal(b, length, r, h, n), normal(b, length, r, h, n))
    trapezoid += (positive(b, length, h), -positive(b, length, h), jax.nn.sigmoid(normal(b, length, h)), normal(h))
    state = normal(b, h, p, n), normal(b, r, h, n), normal(b, r, h, p)
    return {
        "selective_scan": (
            lambda u, d, A, B, C, D, z, s: ssm.selective_scan(u, d, A, B, C, D, z, initial_state=s, **given),
            (normal(b, length, e), positive(b, length, e), -positive(e, n), normal(b, length, n), normal(b, length, n))
            + (normal(e), normal(b, length, e), normal(b, e, n)),
        ),
        "ssd": (
            lambda x, d, A, B, C, D, s: ssm.ssd(x, d, A, B, C, D, initial_state=s, **few, **given),
            (normal(b, length, h, p), positive(b, length, h), rates, normal(b, length, g, n), normal(b, length, g, n))
            + (normal(h), normal(b, h, p, n)),
        ),
        "linear_attention": (
            lambda q, k, v, d, s: ssm.linear_attention(q, k, v, d, initial_state=s, **few, **given),
            (normal(b, length, h, n), normal(b, length, g, n), normal(b, length, g, p), -positive(b, length, h))
            + (normal(b, h, p, n),),
        ),
        "trapezoid": (
            lambda *a: ssm.trapezoid(*a[:7], initial_state=ssm.TrapezoidState(*a[7:]), **few, **given),
            (*trapezoid, *state),
        ),
        "causal_conv1d": (
            lambda x, w, c, s: ssm.causal_conv1d(x, w, c, initial_state=s, **given),
            (normal(b, length, e), normal(e, 4), normal(e), normal(b, 3, e)),
        ),
        "fft_conv": convolve(True, length),
        "fft_conv both ways": convolve(False, 2 * length),
        "fft_conv short": convolve(True, 3),
        "fft_conv short both ways": convolve(False, 6),
        "attention by heads": attention(8, True, 5),
        "attention by queries": attention(6, False, None),
    }


OPTIONS = {
    "mamba": ssm.MambaConfig(d_state=3),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=8, chunk_size=4),
    "mamba3": ssm.Mamba3Config(d_state=8, head_dim=8, chunk_size=4),
    "linear_attn": ssm.LinearAttentionConfig(head_dim=8, chunk_size=4),
    "m2": m2.M2Config(l_max=64, filter=m2.HyenaFilterConfig(order=8), residual_long_conv=True),
    "attn": zoo.AttentionConfig(head_dim=8),
    "moe": zoo.MoEConfig(n_experts=4, d_ff=16),
}
CAUSAL = ("mamba/mlp", "mamba2/monarch", "mamba3/moe", "linear_attn/mlp", "m2/monarch[order=2]", "attn/mlp", "zamba2")
CAUSAL += ("attn[head_dim=16,position=alibi,n_kv_heads=1]",)
TWO_SIDED = ("mamba/mlp", "mamba2/mlp", "m2/monarch", "attn/mlp", "mamba3", "linear_attn", "vim")
IMAGES = ("vim", "ss2d/mlp", "m2[conv=2d]/monarch", "attn/mlp", "mamba2")


def model_case(build, call, inputs):
    graphdef, params, rest = nnx.split(with_random_parameters(build), nnx.Param, ...)
    return lambda params: call(nnx.merge(graphdef, params, rest), *inputs), (params,)


def models():
    """name -> () -> (function, arrays) of a model's outputs as a function of its parameters."""
    shape = {"d_model": 32, "n_layers": 2, "dtype": "float64", "param_dtype": "float64", **OPTIONS}
    tokens = jnp.asarray(numbers.integers(0, 30, (2, 48)), jnp.int32)
    mask, ids = positions("masked packed", 2, 48)
    images = normal(2, 12, 16, 3)
    cases = {}
    for pattern in CAUSAL:
        config = zoo.CausalLMConfig(pattern=pattern, vocab_size=40, **shape)
        build = lambda config=config: zoo.CausalLM(config, rngs=nnx.Rngs(0))  # noqa: E731

        def masked(m, *inputs, there=mask):
            return jnp.where(there[..., None], m(*inputs), 0)

        def continued(m, tokens):
            y, state = m.extend(tokens, m.init_state(2, 96))
            return m.extend(tokens, state)[0], y

        cases[f"causal {pattern} plain"] = build, lambda m, t: m(t), (tokens,)
        cases[f"causal {pattern} packed"] = build, masked, (tokens, mask, ids)
        if "m2" not in pattern:
            cases[f"causal {pattern} continued"] = build, continued, (tokens,)
    for pattern in TWO_SIDED:
        config = zoo.MaskedLMConfig(pattern=pattern, vocab_size=40, max_len=48, **shape)
        build = lambda config=config: zoo.MaskedLM(config, rngs=nnx.Rngs(0))  # noqa: E731
        cases[f"two-sided {pattern} packed"] = build, masked, (tokens, mask, ids)
    for pool in ("first", "mean", "last", "attention"):
        config = zoo.SequenceClassifierConfig(
            pattern="mamba2", vocab_size=40, max_len=48, n_labels=3, pool=pool, **shape
        )
        build = lambda config=config: zoo.SequenceClassifier(config, rngs=nnx.Rngs(0))  # noqa: E731
        cases[f"pooled {pool}"] = build, lambda m, *inputs: m(*inputs), (tokens, mask)
    for pattern in IMAGES:
        by_rows = "2d" in pattern
        kind = {"class_token": "none", "pool": "mean"} if by_rows else {"class_token": "middle"}
        config = zoo.ImageClassifierConfig(
            pattern=pattern, image_size=16, patch_size=2, n_classes=5, causal=False, **kind, **shape
        )
        build = lambda config=config: zoo.ImageClassifier(config, rngs=nnx.Rngs(0))  # noqa: E731
        cases[f"image {pattern}"] = build, lambda m, x: m(x), (images,)
    return cases


def gathers(text, length):
    """Arrays of floats that are gathered along positions."""
    found = re.findall(r"= (?:f32|f64|bf16)\[([\d,]+)\]\S* all-gather\(.*dimensions=\{1\}", text)
    return [shape for shape in found if int(shape.split(",")[1]) == length]


def received(text):
    """Bytes that a device receives in one run, of collectives outside loops: {kind: bytes}."""
    sizes = {"f64": 8, "f32": 4, "s32": 4, "s64": 8, "pred": 1}
    total = {}
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        for result in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
                size = int(np.prod([int(n) for n in shape.split(",") if n]))
                total[kind] = total.get(kind, 0) + sizes[dtype] * size
    return total


def check_exchanges():
    """What operations send does not grow with the length; a long convolution's all-to-alls do, and by that alone."""
    sent = {}
    for length in (64, 128):
        for name, (function, arrays) in operations("packed", length).items():
            if name in ("ssd", "selective_scan", "trapezoid", "causal_conv1d", "fft_conv"):
                error, text = differences(function, arrays, on(sequence=8))
                assert error < TOLERANCE, (name, error)
                assert not gathers(text, length), (name, gathers(text, length))
                sent.setdefault(name, []).append(received(text))
    for name, (short, long) in sent.items():
        if name == "fft_conv":
            # 2 rows of 8 channels (6, filled up) and so many positions, over 8 devices: there and back, twice.
            assert [x["all-to-all"] for x in (short, long)] == [4 * 2 * 8 * n // 8 * 8 for n in (64, 128)], (
                short,
                long,
            )
        else:
            assert short == long, (name, short, long)
    state = 2 * 8 * 5 * 3 * 8  # b h p n of float64
    # Into each piece: 3 steps and a shift, forwards and for the adjoint; the decays and ids are small beside them.
    permuted = sent["ssd"][0]["collective-permute"]
    assert 8 * state <= permuted <= 10 * state, permuted


def main(wanted):
    jax.config.update("jax_enable_x64", True)
    worst = []

    def check(name, function, arrays, length=None, mesh=None):
        error, text = differences(function, arrays, mesh or on(data=2, sequence=4))
        wrong = error > TOLERANCE or (length is not None and gathers(text, length))
        print(f"{name:50s} {error:.1e} {gathers(text, length) if length else ''}", flush=True)
        if wrong:
            worst.append(name)

    def is_wanted(name):
        return not wanted or any(name.startswith(start) for start in wanted)

    for kind in ("plain", "packed", "twos", "masked", "masked packed", "gaps"):
        for length in (48, 37, 6):
            if any(is_wanted(f"{start} {kind} {length}") for start in operations("plain", 6)):
                for start, (function, arrays) in operations(kind, length).items():
                    if is_wanted(f"{start} {kind} {length}"):
                        check(f"{start} {kind} {length}", function, arrays)
    for name, case in models().items():
        if is_wanted(name):
            split = not (name.startswith("image") or "n_kv_heads" in name)
            check(name, *model_case(*case), length=48 if split else None)
    if is_wanted("exchanges"):
        check_exchanges()
    if worst:
        raise SystemExit(f"not as on one device: {', '.join(worst)}")


if __name__ == "__main__":
    main(sys.argv[1:])
