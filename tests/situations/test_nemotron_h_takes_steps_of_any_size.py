"""Nemotron-H's config limits no step, and small ones came out raised to time_step_min: logits off by up to 1.5.

LOGITS, of the last of IDS, are those of transformers 5.24 on a CPU for tests/published/nemotron_h with 6 taken from its
dt_bias, and the limits of its config put into its modules (module.time_step_limit = ...), which it does not do itself.
"""

import json

import jax.numpy as jnp
import numpy as np

import zoo
from tests.numerics import jitted
from tests.places import PUBLISHED
from zoo.published.weight_files import open_weights, save_weights

IDS = [[3, 14, 15, 9, 2, 6, 5, 6, 8, 9]]
LOGITS = [
    -1.10685,
    -2.36871,
    -0.85118,
    1.90757,
    -1.27945,
    -2.32852,
    -0.40868,
    1.58488,
    -0.81031,
    1.34380,
    -3.56934,
    1.01423,
    1.04886,
    -0.10534,
    -0.83811,
    -0.84595,
    -0.02190,
    -3.99483,
    1.07392,
    0.87034,
    -2.48300,
    -4.16872,
    0.68685,
    0.12545,
    -2.84584,
    -0.71529,
    -4.77136,
    2.13517,
    1.47538,
]


def test_logits_are_those_of_the_limits_in_the_config(tmp_path):
    """What users met: a model of published weights that says other things than its publisher's."""
    tensors = {name: tensor.read() for name, tensor in open_weights(PUBLISHED / "nemotron_h").items()}
    save_weights(tmp_path, {name: x - 6 * name.endswith("dt_bias") for name, x in tensors.items()})
    raw = json.loads((PUBLISHED / "nemotron_h" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"time_step_limit": [0, float("inf")]}))
    call, params = jitted(zoo.from_pretrained(tmp_path))
    np.testing.assert_allclose(call(params, jnp.asarray(IDS))[0, -1], LOGITS, atol=1e-4)
    floored, params = jitted(zoo.from_pretrained(tmp_path, as_transformers=True))
    assert np.abs(floored(params, jnp.asarray(IDS))[0, -1] - jnp.asarray(LOGITS)).max() > 1e-3
