"""What every state-space mixer keeps: one map whichever way the sequence is cut, padded or packed."""

from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, normal, with_random_parameters

D_MODEL, BATCH, LENGTH = 8, 3, 8

# Chunks of 3, so that eight positions cross chunks and fill the last one up.
MIXERS = {
    "mamba": (ssm.Mamba, ssm.MambaConfig(d_state=4, dt_rank=2, bias=True, bcdt_rms=True, chunk_size=3)),
    "mamba with weights": (ssm.Mamba, ssm.MambaConfig(d_state=4, bcdt_rms=True, bcdt_rms_weight=True, chunk_size=3)),
    "mamba2": (ssm.Mamba2, ssm.Mamba2Config(d_state=4, head_dim=4, chunk_size=3)),
    "mamba2 with options": (
        ssm.Mamba2,
        ssm.Mamba2Config(
            d_state=4,
            head_dim=2,
            n_groups=2,
            d_ssm=8,
            D_has_hdim=True,
            norm_before_gate=True,
            dt_limit=(0.3, 1.5),
            bias=True,
            in_multiplier=1.3,
            multipliers=(0.9, 0.8, 1.2, 1.1, 0.7),
            out_multiplier=0.6,
            chunk_size=3,
        ),
    ),
    "mamba3": (ssm.Mamba3, ssm.Mamba3Config(d_state=8, head_dim=4, chunk_size=3)),
    "mamba3 mimo": (
        ssm.Mamba3,
        ssm.Mamba3Config(
            d_state=4,
            head_dim=4,
            n_groups=2,
            rope_fraction=1.0,
            is_mimo=True,
            mimo_rank=3,
            is_outproj_norm=True,
            chunk_size=3,
        ),
    ),
    "linear attention": (ssm.LinearAttention, ssm.LinearAttentionConfig(n_heads=2, chunk_size=3)),
    "linear attention with options": (
        ssm.LinearAttention,
        ssm.LinearAttentionConfig(
            n_heads=4,
            n_kv_heads=2,
            head_dim=3,
            d_conv=3,
            activation="identity",
            norm=False,
            gate_bias=True,
            bias=True,
            chunk_size=3,
        ),
    ),
}

# Beside biases, which all of them leave out: "D", the rates, the norms.
WITHOUT_WEIGHT_DECAY = {
    "mamba": {"A_log", "D", "conv1d/bias", "dt_proj/bias", "in_proj/bias", "out_proj/bias"},
    "mamba with weights": {
        *("A_log", "D", "conv1d/bias", "dt_proj/bias"),
        *("dt_norm/scale", "B_norm/scale", "C_norm/scale"),
    },
    "mamba2": {"A_log", "D", "dt_bias", "conv1d/bias", "norm/scale"},
    "mamba2 with options": {"A_log", "D", "dt_bias", "conv1d/bias", "norm/scale", "in_proj/bias", "out_proj/bias"},
    "mamba3": {"D", "dt_bias", "B_bias", "C_bias", "B_norm/scale", "C_norm/scale"},
    "mamba3 mimo": {"D", "dt_bias", "B_bias", "C_bias", "B_norm/scale", "C_norm/scale", "norm/scale"},
    "linear attention": {"A_log", "dt_bias", "norm/scale", "conv1d/bias"},
    "linear attention with options": {
        *("A_log", "dt_bias", "conv1d/bias", "gate_proj/bias"),
        *("q_proj/bias", "k_proj/bias", "v_proj/bias", "o_proj/bias"),
    },
}

IN_FLOAT32 = {
    "mamba": {"A_log", "D", "dt_proj/bias"},
    "mamba with weights": {*("A_log", "D", "dt_proj/bias"), *("dt_norm/scale", "B_norm/scale", "C_norm/scale")},
    "mamba2": {"A_log", "D", "dt_bias", "norm/scale"},
    "mamba2 with options": {"A_log", "D", "dt_bias", "norm/scale"},
    "mamba3": WITHOUT_WEIGHT_DECAY["mamba3"],
    "mamba3 mimo": WITHOUT_WEIGHT_DECAY["mamba3 mimo"] | {"mimo_x", "mimo_z", "mimo_o"},
    "linear attention": {"A_log", "dt_bias", "norm/scale"},
    "linear attention with options": {"A_log", "dt_bias"},
}

# Packed rows, and how each is cut: the padding at the ends of row 1 bears the ids of its neighbours.
SEGMENT_IDS = np.array([[3, 3, 3, 3, 8, 8, 8, 8], [5, 5, 5, 5, 5, 7, 7, 7], [1, 0, 0, 0, 0, 1, 2, 1]])
THERE = np.array([[True] * 8, [False] + [True] * 5 + [False] * 2, [True] * 8])
DOCUMENTS = {0: [(0, 4), (4, 8)], 1: [(1, 5), (5, 6)], 2: [(0, 1), (1, 5), (5, 6), (6, 7), (7, 8)]}


def make_mixer(name, param_dtype="float64", **kwargs):
    """A mixer in which every parameter, biases included, matters."""
    mixer, config = MIXERS[name]
    kwargs = {"param_dtype": jnp.dtype(param_dtype)} | kwargs
    return with_random_parameters(lambda: mixer(D_MODEL, config, **kwargs, rngs=nnx.Rngs(0)))


def flat(module):
    """Parameters by name: "dt_proj/bias" and so on."""
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module))}


def make_input(length=LENGTH):
    return normal(jax.random.key(1), BATCH, length, D_MODEL)


def comparable(state):
    """The state, its angles as points of the circle: 0 and 2 pi are one angle."""
    if isinstance(state, ssm.Mamba3State):
        return state._replace(angle=jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle)]))
    return state


def row(tree, i):
    return jax.tree.map(lambda a: a[i : i + 1], tree)


@pytest.fixture(scope="module", params=MIXERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def mixer(name):
    """A mixer in float64 and its calls, each compiled once a shape: whole, positions given, and one position."""
    with jax.enable_x64(True):
        module = make_mixer(name)

    def extend(x, state, mask=None, segment_ids=None):
        return module.extend(x, state, mask=mask, segment_ids=segment_ids)

    compiled = jax.jit(extend)

    def with_positions(x, state=None, mask=None, segment_ids=None):
        """Pieces always bring a mask and segments, if only plain ones, and so share what is compiled."""
        ones = np.ones(x.shape[:2])
        mask = ones.astype(bool) if mask is None else mask
        segment_ids = ones.astype(int) if segment_ids is None else segment_ids
        return compiled(x, module.init_state(BATCH) if state is None else state, mask, segment_ids)

    return SimpleNamespace(module=module, call=jax.jit(module.__call__), extend=with_positions, step=compiled)


def test_extend_over_any_split_is_the_whole_call(x64, mixer):
    x = make_input()
    whole, (_, final) = mixer.call(x), mixer.extend(x)
    for pieces in [(8,), (4, 4), (4, 1, 1, 1, 1), (1,) * 4 + (4,)]:
        state, outputs = mixer.module.init_state(BATCH), []
        for piece in jnp.split(x, np.cumsum(pieces)[:-1], axis=1):
            y, state = (mixer.step if piece.shape[1] == 1 else mixer.extend)(piece, state)
            outputs.append(y)
        assert_close(jnp.concatenate(outputs, axis=1), whole, name=str(pieces))
        assert_close(comparable(state), comparable(final), name=str(pieces))


def test_padding_on_either_side_changes_nothing(x64, mixer):
    x, padding = make_input(4), jnp.full((BATCH, 4, D_MODEL), 100.0)
    expected, expected_state = mixer.extend(x)
    for row_of_pieces, here in (([padding, x], slice(4, 8)), ([x, padding], slice(0, 4))):
        mask = np.zeros((BATCH, 8), bool)
        mask[:, here] = True
        y, state = mixer.extend(jnp.concatenate(row_of_pieces, axis=1), mask=mask)
        assert_close((y[:, here], comparable(state)), (expected, comparable(expected_state)), name=str(here))


def test_a_step_that_is_not_there_leaves_the_state(x64, mixer):
    _, state = mixer.extend(make_input(4))
    _, after = mixer.step(make_input(1), state, np.array([[True], [False], [False]]))
    _, stepped = mixer.step(make_input(1), state)
    for i, expected in enumerate((stepped, state, state)):
        assert_close(comparable(row(after, i)), comparable(row(expected, i)), name=f"row {i}")


def test_packed_and_padded_documents_equal_each_alone(x64, mixer):
    x = make_input()
    packed, final = mixer.extend(x, mask=THERE, segment_ids=SEGMENT_IDS)
    for i, documents in DOCUMENTS.items():
        for start, stop in documents:
            piece = x[:, start:stop]
            one = stop - start == 1
            alone, state = mixer.step(piece, mixer.module.init_state(BATCH)) if one else mixer.extend(piece)
            assert_close(packed[i, start:stop], alone[i], name=f"row {i} from {start}")
        assert_close(comparable(row(final, i)), comparable(row(state, i)), name=f"row {i}")


def test_the_first_document_goes_on_from_the_state(x64, mixer):
    x = make_input()
    _, state = mixer.extend(x[:, :4])
    goes_on, _ = mixer.extend(x[:, 4:], state)
    again, _ = mixer.extend(x, state, segment_ids=np.repeat([[1, 2]], 4, axis=1).repeat(BATCH, axis=0))
    first, _ = mixer.extend(x[:, :4], state)
    assert_close(again[:, :4], first)
    assert_close(again[:, 4:], mixer.extend(x[:, 4:])[0])
    assert np.abs(goes_on - again[:, 4:]).max() > 1e-3


def test_padding_that_is_a_segment_of_its_own_ends_the_one_before_it(x64, mixer):
    there = np.arange(LENGTH)[None].repeat(BATCH, axis=0) < 5
    _, state = mixer.extend(make_input(), mask=there, segment_ids=there.astype(int))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))


def test_sees_its_own_row_up_to_its_own_position(x64, mixer):
    x = make_input()
    y = mixer.call(x)
    for t in range(LENGTH):
        other = np.array(x)
        other[1, t] += 1
        # Mamba-3 adds the next step's left end and takes it out again: the future is in the rounding.
        change = np.any(np.abs(np.asarray(mixer.call(other) - y)) > 1e-12, axis=-1)
        assert not np.any(change[[0, 2]])
        assert not np.any(change[1, :t])
        assert np.all(change[1, t:])


def test_gradients_are_finite_and_reach_every_parameter(x64, mixer):
    graphdef, params = nnx.split(mixer.module)
    weight = normal(jax.random.key(2), BATCH, LENGTH, D_MODEL) * THERE[..., None]

    def loss(params, x):
        y = nnx.merge(graphdef, params)(x, mask=jnp.asarray(THERE), segment_ids=jnp.asarray(SEGMENT_IDS))
        return jnp.sum(y * weight), y

    x = make_input()
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    assert_close(y[THERE], mixer.extend(x, mask=THERE, segment_ids=SEGMENT_IDS)[0][THERE])
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in jax.tree.leaves(gradients))
    assert not np.any(gradients[1][~THERE])


def test_bfloat16_computes_in_bfloat16_and_keeps_the_state_in_float32(name, mixer):
    low = make_mixer(name, "float32", dtype=jnp.bfloat16)
    x = make_input()
    y, state = jax.jit(low.extend)(x, low.init_state(BATCH))
    assert y.dtype == jnp.bfloat16
    wide = {field for field in state._fields if getattr(state, field).dtype == jnp.float32}
    assert wide == {"angle", "ssm"} & set(state._fields)
    with jax.enable_x64(True):
        exact = mixer.call(jnp.asarray(x, float))
    # Half a dozen roundings to eight bits lie between the input and the output projection.
    assert_close(y, exact, tolerance=4e-2)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("length", [1, 8, 100])
def test_state_keeps_its_shapes_and_dtypes(name, dtype, length):
    module = make_mixer(name, "float32", dtype=None if dtype is None else jnp.dtype(dtype))
    x, state = make_input(length), module.init_state(BATCH)
    y, after = jax.eval_shape(module.extend, x, state)
    assert (y.shape, y.dtype) == (x.shape, jnp.dtype(dtype or "float32"))
    whole = jax.eval_shape(module, x)
    assert (whole.shape, whole.dtype) == (y.shape, y.dtype)
    assert [(a.shape, a.dtype) for a in after] == [(a.shape, a.dtype) for a in state]


def test_bfloat16_parameters_leave_those_of_the_recurrence_in_float32(name):
    wide = {path for path, param in flat(make_mixer(name, "bfloat16")).items() if param.dtype == jnp.float32}
    assert wide == IN_FLOAT32[name]


def test_exactly_the_documented_parameters_go_without_weight_decay(name):
    params = flat(make_mixer(name, "float32"))
    without = {path for path, param in params.items() if param.get_metadata("decay", True) is False}
    assert without == WITHOUT_WEIGHT_DECAY[name]


def test_projections_start_uniform_within_one_over_root_fan_in_the_output_scaled(name):
    mixer, config = MIXERS[name]
    plain, scaled = (flat(mixer(32, config, residual_scale=scale, rngs=nnx.Rngs(0))) for scale in (1.0, 0.25))
    out = "o_proj/kernel" if "o_proj/kernel" in plain else "out_proj/kernel"
    for path in ("in_proj/kernel" if "in_proj/kernel" in plain else "q_proj/kernel", out):
        values = np.asarray(plain[path][...]) * plain[path].shape[0] ** 0.5
        assert np.abs(values).max() <= 1 + 1e-6
        assert abs(values.std() * 3**0.5 - 1) < 0.05  # uniform on [-1, 1] has variance 1/3
        assert abs(values.mean()) < 0.05
    for path in plain:
        assert_close(scaled[path][...], plain[path][...] * (0.25 if path == out else 1), name=path)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ssm.MambaConfig, {"d_state": 0}, "d_state=0, expected at least 1"),
        (ssm.MambaConfig, {"d_conv": 0}, "d_conv=0, expected at least 1"),
        (ssm.MambaConfig, {"expand": 0.0}, "expand=0.0, expected more than 0"),
        (ssm.MambaConfig, {"dt_rank": 0}, "dt_rank=0, expected None or at least 1"),
        (ssm.MambaConfig, {"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1, expected 0 < dt_min <= dt_max"),
        (ssm.MambaConfig, {"dt_min": 0.0}, "dt_min=0.0 and dt_max=0.1, expected"),
        (ssm.MambaConfig, {"dt_init": "zeros"}, "dt_init='zeros', expected 'random' or 'constant'"),
        (ssm.MambaConfig, {"bcdt_rms_weight": True}, "bcdt_rms_weight=True, expected bcdt_rms=True"),
        (ssm.Mamba2Config, {"d_state": 0}, "d_state=0, expected at least 1"),
        (ssm.Mamba2Config, {"d_conv": 0}, "d_conv=0, expected at least 1"),
        (ssm.Mamba2Config, {"head_dim": 0}, "head_dim=0, expected at least 1"),
        (ssm.Mamba2Config, {"n_groups": 0}, "n_groups=0, expected at least 1"),
        (ssm.Mamba2Config, {"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1, expected 0 < dt_min <= dt_max"),
        (ssm.Mamba2Config, {"A_min": 0.0}, "A_min=0.0 and A_max=16.0, expected 0 < A_min <= A_max"),
        (ssm.Mamba2Config, {"A_max": 0.5}, "A_min=1.0 and A_max=0.5, expected"),
        (ssm.Mamba2Config, {"dt_limit": (0.2, 0.1)}, r"dt_limit=\(0.2, 0.1\), expected 0 <= lowest <= highest"),
        (ssm.Mamba2Config, {"dt_limit": (-1.0, 0.1)}, r"dt_limit=\(-1.0, 0.1\), expected"),
        (ssm.LinearAttentionConfig, {"n_heads": 0}, "n_heads=0, expected at least 1"),
        (ssm.LinearAttentionConfig, {"d_conv": 0}, "d_conv=0, expected at least 1"),
        (ssm.LinearAttentionConfig, {"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1, expected 0 < dt_min <= dt_max"),
        (ssm.LinearAttentionConfig, {"activation": "relu"}, "activation='relu', expected 'silu' or 'identity'"),
        (ssm.LinearAttentionConfig, {"init": "copy"}, "init='copy', expected 'mamba2' or 'mimic'"),
        (ssm.LinearAttentionConfig, {"gate": False, "gate_bias": True}, "gate_bias=True, expected gate=True"),
        (ssm.Mamba3Config, {"d_state": 7}, "d_state=7, expected an even number"),
        (ssm.Mamba3Config, {"d_state": 0}, "d_state=0, expected an even number"),
        (ssm.Mamba3Config, {"head_dim": 0}, "head_dim=0, expected at least 1"),
        (ssm.Mamba3Config, {"n_groups": 0}, "n_groups=0, expected at least 1"),
        (ssm.Mamba3Config, {"mimo_rank": 0}, "mimo_rank=0, expected at least 1"),
        (ssm.Mamba3Config, {"rope_fraction": 0.0}, "rope_fraction=0.0, expected at most 1, and at least one pair"),
        (ssm.Mamba3Config, {"rope_fraction": 1.5}, "rope_fraction=1.5, expected at most 1"),
        (ssm.Mamba3Config, {"rope_fraction": 0.01}, "rope_fraction=0.01, expected .* at least one pair"),
        (ssm.Mamba3Config, {"dt_max": 0.0001}, "dt_min=0.001 and dt_max=0.0001, expected"),
        (ssm.Mamba3Config, {"A_activation": "relu"}, "A_activation='relu', expected 'heavy_tail' or 'softplus'"),
    ],
)
def test_config_errors_name_the_option(config, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("mixer", "config", "message"),
    [
        (ssm.Mamba2, ssm.Mamba2Config(head_dim=5), "head_dim=5 must divide the width of the state space, 16 of"),
        (ssm.Mamba2, ssm.Mamba2Config(head_dim=4, d_ssm=20), "the width of the state space, 20 of expand .* = 16"),
        (ssm.Mamba2, ssm.Mamba2Config(head_dim=4, d_ssm=0), "the width of the state space, 0 of"),
        (ssm.Mamba2, ssm.Mamba2Config(head_dim=4, n_groups=3), "n_groups=3 must divide the 4 heads"),
        (ssm.LinearAttention, ssm.LinearAttentionConfig(n_heads=3), "n_heads=3 must divide d_model=8"),
        (ssm.LinearAttention, ssm.LinearAttentionConfig(n_heads=4, n_kv_heads=3), "n_kv_heads=3 must divide n_heads=4"),
        (ssm.Mamba3, ssm.Mamba3Config(head_dim=5), r"head_dim=5 must divide expand \* d_model = 16"),
        (ssm.Mamba3, ssm.Mamba3Config(head_dim=4, n_groups=3), "n_groups=3 must divide the 4 heads"),
    ],
)
def test_widths_that_do_not_divide_are_named(mixer, config, message):
    with pytest.raises(ValueError, match=message):
        mixer(8, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["mamba", "mamba3 mimo"])
def test_exported_for_any_batch_and_length(name, unchecked):
    """One program for three platforms, called with and without padding, from a state and for one position."""
    kind, config = MIXERS[name]
    mixer = kind(D_MODEL, config, rngs=nnx.Rngs(0))
    b, length = jax.export.symbolic_shape("b, l")
    x, mask = jax.ShapeDtypeStruct((b, length, D_MODEL), jnp.float32), jax.ShapeDtypeStruct((b, length), bool)

    def run(x, mask):
        return mixer.extend(x, mixer.init_state(x.shape[0]), mask=mask)

    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(x, mask)
    exported = jax.export.deserialize(exported.serialize())
    x, mask = normal(jax.random.key(0), 2, 70, D_MODEL, dtype=jnp.float32), jnp.arange(70) < jnp.array([[70], [60]])
    y, state = exported.call(x, mask)
    assert_close((y, state), jax.jit(run)(x, mask))
    assert type(state) is type(mixer.init_state(2))
