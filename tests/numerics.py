"""Random inputs and one tolerance table, shared by every test that compares arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Root of the mean squared error over that of the reference, by the dtype that was computed in: (values, gradients).
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}


def rms_ratio(actual, expected) -> float:
    """RMS of the difference over RMS of the expected values; 0 where both are all zero."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if not actual.size:
        return 0.0
    error, scale = (float(np.sqrt(np.mean(x**2))) for x in (actual - expected, expected))
    if error == 0:
        return 0.0
    return error / scale if scale > 0 else np.inf


def assert_close(actual, expected, *, gradient: bool = False, tolerance: float | None = None, name: str = ""):
    """Compares pytrees leaf by leaf. `tolerance` replaces the table's, with the reason in a comment at the call."""
    actual_leaves, structure = jax.tree.flatten(actual)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    assert structure == expected_structure
    for i, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        limit = tolerance if tolerance is not None else TOLERANCES[str(a.dtype)][gradient]
        ratio = rms_ratio(a, e)
        assert ratio <= limit, f"{name} leaf {i}: RMS error {ratio:.2e} of the reference, allowed {limit:.0e}"


def normal(key, *shape, dtype=None):
    """Standard normal numbers in the widest float that is switched on, by numpy: JAX would compile for each shape."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(generator.standard_normal(shape), dtype or jnp.result_type(float))


def with_random_parameters(build, seed: int = 0):
    """The module that `build()` returns, its parameters random: matrices of about unit gain, vectors about one.

    Fresh modules have zeros, ones and a single residual scale in many places, where a mistake would not show.
    """
    generator = np.random.default_rng(seed)

    def draw(abstract):
        noise = generator.standard_normal(abstract.shape)
        value = 1 + 0.3 * noise if noise.ndim == 1 else noise * len(noise) ** -0.5
        return jnp.asarray(value, abstract.dtype)

    graphdef, params = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.tree.map(draw, params))


def jitted(model, method="__call__"):
    """A method of a module as one compiled function of its parameters and the arguments, and the parameters."""
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params, *args, **kw: getattr(nnx.merge(graphdef, params), method)(*args, **kw)), params


def make_positions(length, *, b=2, boundaries=0.1):
    """A mask with holes and packed segments, both irregular and different in each row."""
    rng = np.random.default_rng(length)
    mask = jnp.asarray(rng.random((b, length)) > 0.2)
    segment_ids = jnp.asarray(np.cumsum(rng.random((b, length)) < boundaries, axis=1))
    return {"mask": mask, "segment_ids": segment_ids}


def value_and_gradients(op, inputs, positions):
    """(y, final state) of a scan, and the gradient of both, each weighted at random, in every input.

    `inputs` starts with the array that y has the shape of, and holds "initial_state".
    """
    y_weight = normal(jax.random.key(8), *next(iter(inputs.values())).shape)
    state_weight = normal(jax.random.key(9), *inputs["initial_state"].shape)

    def total(inputs):
        y, state = op(**inputs, **positions)
        return jnp.sum(y * y_weight) + jnp.sum(state * state_weight), (y, state)

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return out, gradients


_PRODUCT = re.compile(
    r"stablehlo.dot_general .*?(?:precision = \[(\w+), \w+\])?\s*"
    r": \(tensor<(\w+)>, tensor<(\w+)>\) -> tensor<(\w+)>"
)


def tpu_products(function, *arguments):
    """{(precision, dtypes of the operands, dtype of the result)} of the products in the program for a TPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    found = _PRODUCT.findall(text)
    assert len(found) == text.count("stablehlo.dot_general")
    return {(one, *(kind.split("x")[-1] for kind in (a, b, c))) for one, a, b, c in found}
