"""Connectors: what becomes of an image's patches before a language model reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from ssm.scan_order import scan_order
from tests.numerics import assert_close, normal, with_random_parameters
from zoo.layers.connectors import Connector, ConnectorConfig, pixel_shuffle
from zoo.layers.visual_scan import VisualScan
from zoo.layers.visual_vocabulary import VisualVocabulary

GRID = (4, 6)
MAMBA2 = ssm.Mamba2Config(d_state=4, head_dim=8)
KINDS = {
    "linear": {"kind": "linear"},
    "mlp of three": {"depth": 3, "d_hidden": 5},
    "squares": {"shuffle": 2},
    "scan": {"kind": "scan", "mamba2": MAMBA2},
    "cross scan, gated": {"kind": "scan", "scan": "cross", "gated": True, "mamba2": MAMBA2},
    "scan of squares": {"kind": "scan", "shuffle": 2, "mamba2": MAMBA2},
    "queries": {"kind": "queries", "n_queries": 3, "n_heads": 2},
    "vocabulary": {"kind": "vocabulary", "vocabulary_size": 7},
}


def connector(**fields):
    return with_random_parameters(lambda: Connector(8, 16, ConnectorConfig(**fields), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", KINDS)
def test_an_image_becomes_the_tokens_that_its_config_says(name):
    config, model = ConnectorConfig(**KINDS[name]), connector(**KINDS[name])
    rows, columns = config.grid(GRID)
    x = normal(jax.random.key(0), 2, 24, 8)

    def loss(x):
        y = model(x, GRID)
        return jnp.sum(jnp.sin(y)), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert y.shape == (2, rows * columns, 16)
    assert float(jnp.abs(gradient).max(axis=-1).min()) > 0  # every patch is read


def test_squares_of_patches_lie_end_to_end():
    x = jnp.arange(24.0).reshape(1, 24, 1)
    np.testing.assert_array_equal(pixel_shuffle(x, GRID, 2)[0, :2], [[0, 1, 6, 7], [2, 3, 8, 9]])
    np.testing.assert_array_equal(pixel_shuffle(x, GRID, 2)[0, 3], [12, 13, 18, 19])
    with pytest.raises(ValueError, match="shuffle=4 must divide both sides of the 4 x 6 patches"):
        ConnectorConfig(shuffle=4).grid(GRID)


@pytest.mark.parametrize("orders", ["bidirectional", "cross"])
def test_a_visual_scan_is_each_order_by_itself_added_up(orders):
    scan = with_random_parameters(lambda: VisualScan(8, orders, MAMBA2, rngs=nnx.Rngs(0)))
    x = normal(jax.random.key(0), 1, 24, 8)

    def by_hand(x):
        total, normed = x, scan.norm(x)
        for order, mixer in zip(scan_order(orders, GRID), scan.directions, strict=True):
            total = total.at[:, order].add(mixer(normed[:, order]))
        return total

    assert_close(jax.jit(lambda x: scan(x, GRID))(x), jax.jit(by_hand)(x))


def test_a_patch_that_is_one_word_for_certain_is_a_row_of_the_table():
    model = with_random_parameters(lambda: VisualVocabulary(8, 16, 7, rngs=nnx.Rngs(0)))
    words = jnp.asarray([[3, 0, 6, 3]])
    np.testing.assert_array_equal(model.embed(jax.nn.one_hot(words, 7)), model.table[...][words])
    x = normal(jax.random.key(0), 1, 4, 8)
    assert_close(jnp.sum(model.probabilities(x), axis=-1), jnp.ones((1, 4)))
    assert_close(model(x), model.probabilities(x) @ model.table[...])


def test_queries_read_a_patch_by_what_and_where_it_is():
    """Patches in another order are the same to a reader that knows no places; here they are not."""
    model, x = connector(**KINDS["queries"]), normal(jax.random.key(0), 1, 24, 8)
    run = jax.jit(lambda x: model(x, GRID))
    assert float(jnp.abs(run(x) - run(x[:, ::-1])).max()) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mpl"}, "unknown kind of connector 'mpl', did you mean 'mlp'"),
        ({"shuffle": 0}, "shuffle=0, expected at least 1"),
        ({"activation": "gelo"}, "did you mean 'gelu'"),
        ({"n_heads": 0}, "n_heads=0, expected None or at least 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ConnectorConfig(**fields)
