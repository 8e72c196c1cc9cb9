"""What every mixer keeps, for masks, segments and splits that Hypothesis draws: absent, packed, cut up.

Rows have one shape, and each function is compiled once for a mixer: what is drawn are numbers alone. Mixers of images
read whole ones: they refuse masks, segments and pieces, and keep the images of a batch apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m2
import ssm
import zoo
from tests.numerics import with_random_parameters
from zoo.stack.mixers import OURS
from zoo.stack.pattern import mixer_name, pattern_mixers

B, L, D_MODEL = 2, 8, 8
OPTIONS = {
    "d_model": D_MODEL,
    "n_layers": 1,
    "mamba": ssm.MambaConfig(d_state=4, dt_rank=2, chunk_size=3),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=4, chunk_size=3),
    "mamba3": ssm.Mamba3Config(d_state=4, head_dim=4, chunk_size=3),
    "vim": ssm.MambaConfig(d_state=4, dt_rank=2, chunk_size=3),
    "ss2d": ssm.SS2DConfig(d_state=4, dt_rank=2, chunk_size=3),
    "attn": zoo.AttentionConfig(n_heads=2, implementation="blocks"),  # zamba2's is dense
    # Three pieces of the shape of a row, absent positions counted.
    "m2": m2.M2Config(l_max=3 * L, filter=m2.HyenaFilterConfig(order=4)),
    "zamba2": zoo.Zamba2Config(n_heads=2, adapter_rank=2),
    "linear_attn": ssm.LinearAttentionConfig(n_heads=2, chunk_size=3),
    "mlp": zoo.MLPConfig(d_ff=8),
    "monarch": m2.MonarchMLPConfig(d_ff=8),
    # What its losses add is a mean over all rows, which packing changes.
    "moe": zoo.MoEConfig(n_experts=3, d_ff=4, n_shared=1, balance_weight=0.0),
}
CAUSAL = ["mamba", "mamba2", "mamba3", "m2", "attn", "attn[d_conv=3,window=3]", "zamba2", "linear_attn"]
CAUSAL += ["mamba2+attn", "-/mlp", "-/monarch", "-/moe"]
BOTH_WAYS = ["vim", "m2", "attn", "mamba2"]
OTHERS = ["mamba", "mamba3", "linear_attn"]
CASES = [(p, True, "float32") for p in CAUSAL] + [(p, False, "float32") for p in BOTH_WAYS]
CASES += [("mamba2", True, "bfloat16"), ("attn", True, "bfloat16")]
DEEP = [(p, True, dtype) for p in CAUSAL for dtype in ("float32", "bfloat16") if (p, dtype) != ("-/moe", "bfloat16")]
DEEP += [(p, False, dtype) for p in BOTH_WAYS + OTHERS for dtype in ("float32", "bfloat16")]
# Images of the L places of a row.
GRID = (2, 4)
IMAGES = ["ss2d", "m2[conv=2d]"]
# (values, gradients), relative to the largest number. In bfloat16 a row that is moved is rounded elsewhere.
TOLERANCE = {"float32": (5e-5, 5e-4), "bfloat16": (5e-2, 1e-1)}


def quick(test):
    return settings(max_examples=8, derandomize=True, deadline=None, database=None)(test)


@st.composite
def rows(draw):
    """A mask with gaps anywhere, empty rows too, and numbers by a seed."""
    mask = np.array(draw(st.lists(st.booleans(), min_size=B * L, max_size=B * L))).reshape(B, L)
    x, weight = np.random.default_rng(draw(st.integers(0, 2**16))).standard_normal((2, B, L, D_MODEL))
    return x.astype(np.float32), weight.astype(np.float32) * mask[..., None], mask


@st.composite
def documents(draw):
    """Numbers of documents that follow each other in each row, at most three."""
    cuts = draw(st.lists(st.lists(st.integers(0, L), min_size=2, max_size=2), min_size=B, max_size=B))
    return np.array([[sum(cut <= t for cut in row) for t in range(L)] for row in cuts])


@functools.cache
def compiled(pattern, causal, dtype):
    """(whole, pieces): value, output and gradients of a backbone over a row, and over three pieces of it."""
    config = zoo.BackboneConfig(pattern=pattern, causal=causal, dtype=dtype, **OPTIONS)
    graphdef, params = nnx.split(with_random_parameters(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0))))

    def whole(params, x, weight, mask, segment_ids):
        y, loss = nnx.merge(graphdef, params).run(x, mask=mask, segment_ids=segment_ids)
        return jnp.sum(jnp.where(mask[..., None], y, 0) * weight) + loss, y

    def pieces(params, x, weight, masks):
        backbone = nnx.merge(graphdef, params)

        def step(state, mask):
            y, state = backbone.extend(x, state, mask=mask)
            return state, jnp.where(mask[..., None], y, 0)

        y = jnp.sum(jax.lax.scan(step, backbone.init_state(B, 3 * L), masks)[1], axis=0)
        return jnp.sum(y * weight), y

    def run(function):
        of = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))

        def call(*inputs):
            (_, y), (of_params, of_x) = jax.device_get(of(params, *inputs))
            return y, of_x, of_params

        return call

    return run(whole), run(pieces)


@functools.cache
def compiled_images(pattern, dtype):
    """Value, output and gradients of a backbone over images."""
    config = zoo.BackboneConfig(pattern=pattern, causal=False, dtype=dtype, **OPTIONS)
    graphdef, params = nnx.split(with_random_parameters(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0))))

    def run(params, x, weight):
        y = nnx.merge(graphdef, params)(x, grid=GRID)
        return jnp.sum(y * weight), y

    of = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))

    def call(*inputs):
        (_, y), (of_params, of_x) = jax.device_get(of(params, *inputs))
        return y, of_x, of_params

    return nnx.merge(graphdef, params), call


def assert_near(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error, scale = (float(np.max(np.abs(v), initial=0)) for v in (a - e, e))
        assert error <= tolerance * (scale + 1), f"{error:.1e} of {scale:.1e}, allowed {tolerance:.0e}"


def closed(x, mask):
    """Rows whose present positions come first, and where they were."""
    order = np.argsort(~mask, axis=1, kind="stable")
    return np.take_along_axis(x, order[..., None] if x.ndim == 3 else order, axis=1)


def check_absent(case, drawn, ids, junk):
    """Whatever lies at absent positions, and wherever they are, all else is as without them."""
    whole, (x, weight, mask) = compiled(*case)[0], drawn
    ids = np.minimum.accumulate(np.where(mask, ids, L)[:, ::-1], axis=1)[:, ::-1]  # absent: of the next that is there
    ids = np.where(ids == L, np.max(np.where(mask, ids, 0), axis=1, keepdims=True), ids)
    y, of_x, of_params = whole(np.where(mask[..., None], x, 0), weight, mask, ids)
    filled = whole(np.where(mask[..., None], x, np.float32(junk)), weight, mask, ids)
    np.testing.assert_array_equal(filled[0][mask], y[mask])
    jax.tree.map(np.testing.assert_array_equal, filled[1:], (of_x, of_params))
    assert np.all(np.isfinite(y[mask]))
    assert not np.any(of_x[~mask])

    values, gradients = TOLERANCE[case[2]]
    alone = whole(*(closed(a, mask) for a in (np.where(mask[..., None], x, 0), weight, mask, ids)))
    there = closed(mask, mask)
    assert_near(alone[0][there], y[mask], values)
    assert_near((alone[1][there], alone[2]), (of_x[mask], of_params), gradients)


def check_packed(case, drawn, ids):
    """Each document of a row gets what it gets alone."""
    whole, (x, weight, mask) = compiled(*case)[0], drawn
    y, of_x, of_params = whole(x, weight, mask, ids)
    values, gradients = TOLERANCE[case[2]]
    one, total = np.zeros_like(ids), jax.tree.map(np.zeros_like, (of_x, of_params))
    for document in range(3):
        here = mask & (ids == document)
        alone = whole(x, weight * here[..., None], here, one)
        assert_near(alone[0][here], y[here], values)
        total = jax.tree.map(np.add, total, alone[1:])
    assert_near(total, (of_x, of_params), gradients)


def check_split(case, drawn, cuts):
    """A row in three pieces, each going on from the state behind the last, is the whole row."""
    (whole, pieces), (x, weight, mask) = compiled(*case), drawn
    first, second = sorted(cuts)
    piece = np.arange(L)[None] >= np.array([first, second])[:, None]
    masks = np.stack([mask & (piece.sum(axis=0) == number) for number in range(3)])
    y, *of_whole = whole(x, weight, mask, np.zeros((B, L), int))
    split, *of_split = pieces(x, weight, masks)
    values, gradients = TOLERANCE[case[2]]
    assert_near(split[mask], y[mask], values)
    assert_near(of_split, of_whole, gradients)


def check_images(case, drawn, junk):
    """Images of a batch do not see each other, whatever one holds."""
    call, (x, weight, _) = compiled_images(*case)[1], drawn
    y, of_x, of_params = call(x, weight)
    total = jax.tree.map(np.zeros_like, of_params)
    for row in range(B):
        here = np.arange(B) == row
        other = call(np.where(here[:, None, None], x, np.float32(junk)), weight)
        np.testing.assert_array_equal(other[0][row], y[row])
        np.testing.assert_array_equal(other[1][row], of_x[row])
        alone = call(x, weight * here[:, None, None])
        assert not np.any(alone[1][~here])
        total = jax.tree.map(np.add, total, alone[2])
    assert_near(total, of_params, TOLERANCE[case[1]][1])


JUNK = st.sampled_from([0.0, 1e4, np.inf, -np.inf, np.nan])
CUTS = st.tuples(st.integers(0, L), st.integers(0, L))
ABSENT = {"drawn": rows(), "ids": documents(), "junk": JUNK}
PACKED = {"drawn": rows(), "ids": documents()}
SPLIT = {"drawn": rows(), "cuts": CUTS}
SPLIT_CASES = [case for case in CASES if case[1]]


def named(cases):
    def as_said(case):
        return f"{case[0]}, {'one way' if case[1] else 'both ways'}, {case[2]}"

    return pytest.mark.parametrize("case", cases, ids=as_said)


@named(CASES)
@quick
@given(**ABSENT)
def test_masked_is_absent_whatever_lies_there(case, drawn, ids, junk):
    check_absent(case, drawn, ids, junk)


@named(CASES)
@quick
@given(**PACKED)
def test_packed_is_alone(case, drawn, ids):
    check_packed(case, drawn, ids)


@named(SPLIT_CASES)
@quick
@given(**SPLIT)
def test_any_split_is_the_whole(case, drawn, cuts):
    check_split(case, drawn, cuts)


@pytest.mark.parametrize("pattern", IMAGES)
@quick
@given(drawn=rows(), junk=JUNK)
def test_images_are_apart_whatever_lies_in_another(pattern, drawn, junk):
    check_images((pattern, "float32"), drawn, junk)


@pytest.mark.parametrize("pattern", IMAGES)
def test_what_would_cut_an_image_is_refused(pattern):
    backbone, x = compiled_images(pattern, "float32")[0], jnp.zeros((B, L, D_MODEL))
    there, ids = jnp.ones((B, L), bool), jnp.zeros((B, L), int)
    for positions in ({"mask": there}, {"segment_ids": ids}, {"mask": there, "segment_ids": ids}):
        with pytest.raises(ValueError, match="reads whole images, expected neither mask nor segment_ids"):
            jax.eval_shape(lambda x, more=positions: backbone(x, grid=GRID, **more), x)
    with pytest.raises(ValueError, match="a bidirectional mixer has no state"):
        backbone.init_state(B, L)


@pytest.mark.slow
@named(DEEP)
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=rows(), ids=documents(), junk=JUNK, cuts=CUTS)
def test_all_of_it_with_more_examples(case, drawn, ids, junk, cuts):
    check_absent(case, drawn, ids, junk)
    check_packed(case, drawn, ids)
    if case[1]:
        check_split(case, drawn, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "pattern", IMAGES + [f"ss2d[scan={order}]" for order in ("raster", "bidirectional", "hilbert")]
)
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=rows(), junk=JUNK)
def test_images_are_apart_with_more_examples(pattern, dtype, drawn, junk):
    check_images((pattern, dtype), drawn, junk)


def test_every_mixer_is_here():
    patterns = [*CAUSAL, *BOTH_WAYS, *IMAGES]
    assert {mixer_name(m) for p in patterns for m in pattern_mixers(p, 1)} | {"mlp", "monarch", "moe"} == OURS
