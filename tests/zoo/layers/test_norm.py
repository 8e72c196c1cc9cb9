"""The normalisations: what they cost in a deep model."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import zoo


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_no_step_of_a_deeper_gradient_reads_more(kind):
    def most_operands(n_layers):
        mlp = zoo.MLPConfig(d_ff=8)
        config = zoo.BackboneConfig(d_model=8, n_layers=n_layers, pattern="-/mlp", mlp=mlp, norm=kind)
        graph, params = nnx.split(zoo.Backbone(config, rngs=nnx.Rngs(0)))
        gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(nnx.merge(graph, params)(x) ** 2)))
        program = gradient.lower(params, jnp.ones((2, 3, 8))).compile().as_text()
        return max(line.count("%") for line in re.findall(r"= .* fusion\(.*", program))

    assert most_operands(6) <= most_operands(4)
