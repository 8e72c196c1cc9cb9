"""The Mamba mixer: one map whichever way the sequence is cut, padded or packed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, normal, with_random_parameters

D_MODEL = 6
CONFIG = ssm.MambaConfig(d_state=4, d_conv=4, dt_rank=2, bias=True)


def make_mixer(config=CONFIG, param_dtype="float64", **kwargs):
    """A mixer in which every parameter, biases included, matters."""
    kwargs = {"dtype": jnp.dtype(param_dtype), "param_dtype": jnp.dtype(param_dtype)} | kwargs
    return with_random_parameters(lambda: ssm.Mamba(D_MODEL, config, **kwargs, rngs=nnx.Rngs(0)))


def compiled(mixer):
    """The mixer's two calls, compiled once for each shape."""
    call = jax.jit(lambda x, mask=None, segment_ids=None: mixer(x, mask=mask, segment_ids=segment_ids))
    extend = jax.jit(
        lambda x, state, mask=None, segment_ids=None: mixer.extend(x, state, mask=mask, segment_ids=segment_ids)
    )
    return call, extend


def flat(module):
    """Parameters by name: "dt_proj/bias" and so on."""
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module))}


def make_input(length, b=2):
    return normal(jax.random.key(1), b, length, D_MODEL)


def test_extend_over_any_split_is_the_whole_call(x64):
    mixer = make_mixer()
    call, extend = compiled(mixer)
    x = make_input(9)
    whole, (_, final) = call(x), extend(x, mixer.init_state(2))
    for pieces in [(9,), (4, 5), (1, 4, 4), (5, 1, 1, 1, 1), (1,) * 9]:
        state, outputs = mixer.init_state(2), []
        for piece in jnp.split(x, np.cumsum(pieces)[:-1], axis=1):
            y, state = extend(piece, state)
            outputs.append(y)
        assert_close((jnp.concatenate(outputs, axis=1), state), (whole, final), name=str(pieces))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(x64, side):
    mixer = make_mixer()
    _, extend = compiled(mixer)
    x, padding = make_input(5), jnp.full((2, 4, D_MODEL), 100.0)
    expected = extend(x, mixer.init_state(2))
    padded = jnp.concatenate([padding, x] if side == "left" else [x, padding], axis=1)
    here = slice(4, 9) if side == "left" else slice(0, 5)
    mask = jnp.zeros((2, 9), bool).at[:, here].set(True)
    y, state = extend(padded, mixer.init_state(2), mask=mask)
    assert_close((y[:, here], state), expected)


def test_a_step_that_is_not_there_leaves_the_state(x64):
    mixer = make_mixer()
    _, extend = compiled(mixer)
    _, state = extend(make_input(5), mixer.init_state(2))
    mask = jnp.array([[True], [False]])
    _, after = extend(make_input(1), state, mask=mask)
    _, stepped = extend(make_input(1), state)
    assert_close(jax.tree.map(lambda a: a[1], after), jax.tree.map(lambda a: a[1], state))
    assert_close(jax.tree.map(lambda a: a[0], after), jax.tree.map(lambda a: a[0], stepped))


def test_packed_documents_equal_each_alone(x64):
    mixer = make_mixer()
    _, extend = compiled(mixer)
    x = make_input(9)
    segment_ids = jnp.asarray([[3, 3, 3, 3, 3, 3, 8, 8, 8], [1, 1, 1, 0, 0, 0, 1, 1, 1]])
    packed, final = extend(x, mixer.init_state(2), segment_ids=segment_ids)
    for row, bounds in ((0, (0, 6, 9)), (1, (0, 3, 6, 9))):
        for start, stop in itertools.pairwise(bounds):
            alone, state = extend(x[row : row + 1, start:stop], mixer.init_state(1))
            assert_close(packed[row : row + 1, start:stop], alone, name=f"row {row} from {start}")
        assert_close(jax.tree.map(lambda a, row=row: a[row : row + 1], final), state)


def test_padding_that_is_a_segment_of_its_own_ends_the_one_before_it(x64):
    mixer = make_mixer()
    position = jnp.arange(6)[None].repeat(2, axis=0)
    _, state = mixer.extend(
        make_input(6), mixer.init_state(2), mask=position < 4, segment_ids=(position < 4).astype(int)
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))


def test_batch_rows_are_independent(x64):
    call, _ = compiled(make_mixer())
    x = make_input(7, b=3)
    assert_close(call(x)[1:2], call(x[1:2]))


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
def test_is_causal(implementation):
    mixer = make_mixer(dataclasses.replace(CONFIG, implementation=implementation, chunk_size=3), "float32")
    jacobian = jax.jit(jax.jacrev(lambda x: mixer(x)[0]))(make_input(8, b=1))
    through_time = jnp.abs(jacobian).sum((1, 2, 4))
    assert not np.any(np.triu(through_time, 1))
    assert np.all(through_time[np.tril_indices(8)])


def test_gradients_are_finite_and_the_same_under_both_implementations(x64):
    x, weight = make_input(20), normal(jax.random.key(2), 2, 20, D_MODEL)

    def gradients(implementation):
        mixer = make_mixer(dataclasses.replace(CONFIG, implementation=implementation, chunk_size=8))
        graphdef, params = nnx.split(mixer)

        def loss(params, x):
            return jnp.sum(nnx.merge(graphdef, params)(x) * weight)

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))

    sequential, associative = gradients("sequential"), gradients("associative")
    assert_close(sequential, associative, gradient=True)
    assert all(np.all(np.isfinite(g)) and np.all(np.any(g)) for g in sequential)


def test_output_is_the_formula_of_figure_3(x64):
    """In matrices, position by position: project, convolve, scan with softplus steps, gate, project."""
    mixer = make_mixer()
    x = np.asarray(make_input(7, b=1))[0]
    p = {name: np.asarray(param[...]) for name, param in flat(mixer).items()}

    def silu(a):
        return a / (1 + np.exp(-a))

    u, z = np.split(x @ p["in_proj/kernel"] + p["in_proj/bias"], 2, axis=-1)
    padded = np.concatenate([np.zeros((3, u.shape[1])), u])
    u = silu(sum(padded[j : j + 7] * p["conv1d/kernel"][:, j] for j in range(4)) + p["conv1d/bias"])
    dt, B, C = np.split(u @ p["x_proj/kernel"], (2, 6), axis=-1)
    delta = np.log1p(np.exp(dt @ p["dt_proj/kernel"] + p["dt_proj/bias"]))
    h, ys = np.zeros((u.shape[1], 4)), []
    for t in range(7):
        decay = np.exp(-np.exp(p["A_log"]) * delta[t, :, None])
        h = decay * h + (delta[t] * u[t])[:, None] * B[t]
        ys.append((h @ C[t] + p["D"] * u[t]) * silu(z[t]))
    assert_close(mixer(jnp.asarray(x[None]))[0], np.stack(ys) @ p["out_proj/kernel"] + p["out_proj/bias"])


def test_bfloat16_computes_in_bfloat16_and_keeps_the_state_in_float32():
    mixer = make_mixer(param_dtype="float32", dtype=jnp.bfloat16)
    state = mixer.init_state(2)
    assert (state.conv.dtype, state.ssm.dtype) == (jnp.bfloat16, jnp.float32)
    call, extend = compiled(mixer)
    x = make_input(12)
    y, after = extend(x, state)
    assert y.dtype == call(x).dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert (after.conv.dtype, after.ssm.dtype) == (jnp.bfloat16, jnp.float32)
    # Half a dozen roundings to eight bits lie between the input and the output projection.
    assert_close(y, make_mixer(param_dtype="float32")(x), tolerance=4e-2)


def test_bfloat16_parameters_leave_decay_skip_and_step_size_in_float32():
    mixer = make_mixer(param_dtype="bfloat16")
    assert {name for name, param in flat(mixer).items() if param.dtype == jnp.float32} == {"A_log", "D", "dt_proj/bias"}


def test_without_dtype_it_computes_in_that_of_parameters_and_input():
    mixer = make_mixer(param_dtype="float32", dtype=None)
    state = mixer.init_state(2)
    y, after = mixer.extend(make_input(1), state)
    assert {a.dtype for a in (y, *state, *after)} == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def fresh():
    """A mixer as it starts, 12 deep, in the published shape: d_state 16, 4 taps, dt_rank d_model / 16."""
    return ssm.Mamba(40, residual_scale=12**-0.5, rngs=nnx.Rngs(0))


def test_sizes_default_to_the_published_ones(fresh):
    shapes = {name: param.shape for name, param in flat(fresh).items()}
    assert shapes == {
        "in_proj/kernel": (40, 160),
        "conv1d/kernel": (80, 4),
        "conv1d/bias": (80,),
        "x_proj/kernel": (80, 3 + 2 * 16),  # 40 / 16, rounded up
        "dt_proj/kernel": (3, 80),
        "dt_proj/bias": (80,),
        "A_log": (80, 16),
        "D": (80,),
        "out_proj/kernel": (80, 40),
    }


def test_state_space_starts_as_the_paper_says(fresh):
    assert_close(jnp.exp(fresh.A_log[...]), jnp.tile(jnp.arange(1.0, 17), (80, 1)))
    assert np.all(np.asarray(fresh.D[...]) == 1)
    dt = np.asarray(jax.nn.softplus(fresh.dt_proj.bias[...]))
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    # Log-uniform: half of them below the geometric mean, where a uniform draw would have a tenth.
    assert 0.3 < np.mean(dt < 0.01) < 0.7


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj/kernel", 40**-0.5),
        ("x_proj/kernel", 80**-0.5),
        ("conv1d/kernel", 4**-0.5),
        ("conv1d/bias", 4**-0.5),
        ("dt_proj/kernel", 3**-0.5),
        ("out_proj/kernel", (80 * 12) ** -0.5),  # residual_scale included
    ],
)
def test_projections_start_uniform_within_one_over_root_fan_in(fresh, name, bound):
    values = np.asarray(flat(fresh)[name][...]) / bound
    assert np.abs(values).max() <= 1 + 1e-6
    assert abs(values.std() * 3**0.5 - 1) < 0.15  # uniform on [-1, 1] has variance 1/3
    assert abs(values.mean()) < 0.15


def test_step_size_options_change_the_start():
    config = ssm.MambaConfig(dt_min=1e-6, dt_max=2.0, dt_floor=0.5, dt_scale=2.0, dt_init="constant", dt_rank=4)
    mixer = ssm.Mamba(40, config, rngs=nnx.Rngs(0))
    dt = np.asarray(jax.nn.softplus(mixer.dt_proj.bias[...]))
    assert np.isclose(dt.min(), 0.5)
    assert 1 < dt.max() < 2
    assert np.all(np.asarray(mixer.dt_proj.kernel[...]) == 2 * 4**-0.5)


def test_exactly_the_state_space_and_the_biases_go_without_weight_decay():
    params = flat(make_mixer(param_dtype="float32"))
    without = {name for name, param in params.items() if param.get_metadata("decay", True) is False}
    assert without == {"A_log", "D", "conv1d/bias", "dt_proj/bias", "in_proj/bias", "out_proj/bias"}


def test_biases_can_be_left_out():
    config = ssm.MambaConfig(conv_bias=False, bias=False, d_state=4)
    mixer = make_mixer(config, "float32")
    assert {name for name in flat(mixer) if name.endswith("bias")} == {"dt_proj/bias"}
    assert mixer(make_input(3)).shape == (2, 3, D_MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=0, expected at least 1"),
        ({"d_conv": 0}, "d_conv=0, expected at least 1"),
        ({"expand": 0}, "expand=0, expected at least 1"),
        ({"dt_rank": 0}, "dt_rank=0, expected None or at least 1"),
        ({"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1, expected 0 < dt_min <= dt_max"),
        ({"dt_min": 0.0}, "dt_min=0.0 and dt_max=0.1, expected"),
        ({"dt_init": "zeros"}, "dt_init='zeros', expected 'random' or 'constant'"),
    ],
)
def test_config_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        ssm.MambaConfig(**options)
