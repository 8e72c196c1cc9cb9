"""What mixers declare: each gets what it asks for and no more, and what it adds to the loss arrives."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, normal
from zoo.layers.needs import hand, needs_of
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS


@dataclasses.dataclass(frozen=True)
class Options:
    weight: float = 1.0
    group: int = 0


class RowMean(ssm.mixer.TwoSided):
    """The mean of the places in the same row of an image."""

    needs = ("grid",)

    def __init__(self, d_model, config, *, causal, **options):
        self.weight = config.weight

    def __call__(self, x, *, grid, mask=None, segment_ids=None):
        b, l, d = x.shape
        mean = x.reshape(b, *grid, d).mean(axis=2, keepdims=True)
        return self.weight * jnp.broadcast_to(mean, (b, *grid, d)).reshape(b, l, d)


class Penalised(ssm.Mixer):
    """The identity, whose training adds the mean square of what is there to the loss."""

    has_auxiliary_loss = True

    def __init__(self, d_model, config, **options):
        self.weight, self.scale = config.weight, nnx.Param(jnp.ones(d_model))

    def __call__(self, x, **positions):
        return self.run(x, **positions)[0]

    def run(self, x, *, mask=None, segment_ids=None):
        y = x * self.scale[...]
        return y, self.weight * jnp.mean(jnp.square(y) if mask is None else jnp.square(y) * mask[..., None])

    def init_state(self, batch_size, max_len=None):
        return ()

    def extend(self, x, state, *, mask=None, segment_ids=None):
        return self(x), state


class Ring(nnx.Module):
    """A channel mixer that reads a grid, and adds to the loss."""

    needs, has_auxiliary_loss = ("grid", "mask"), True

    def __init__(self, d_model, config, **options):
        self.weight = config.weight

    def run(self, x, *, grid, mask, rngs=None):
        return x * grid[1], jnp.float32(self.weight)


class Table(nnx.Module):
    def __init__(self, d_model, rngs):
        self.rows = nnx.Param(jax.random.normal(rngs.params(), (2, d_model)))


class Reader(ssm.Mixer):
    """Adds a table that depths of one group share, and what entered the first block."""

    needs = ("shared", "embeddings")

    def __init__(self, d_model, config, **options):
        self.config = config

    @staticmethod
    def shared_name(config):
        return f"table.{config.group}"

    @staticmethod
    def make_shared(d_model, config, *, dtype, param_dtype, rngs):
        return Table(d_model, rngs)

    def __call__(self, x, *, shared, embeddings, mask=None, segment_ids=None):
        return embeddings + shared[self.shared_name(self.config)].rows[0]

    def init_state(self, batch_size, max_len=None, *, shared):
        return shared[self.shared_name(self.config)].rows[1]

    def extend(self, x, state, *, shared, embeddings, mask=None, segment_ids=None):
        return self(x, shared=shared, embeddings=embeddings), state


@pytest.fixture(autouse=True)
def _registered():
    zoo.register_mixer("row_mean", RowMean, Options(), two_sided=True)
    zoo.register_mixer("penalised", Penalised, Options())
    zoo.register_mixer("reader", Reader, Options())
    zoo.register_channel_mixer("ring", Ring, Options(weight=0.25))
    yield
    for name in ("row_mean", "penalised", "reader", "ring", "other"):
        MIXERS.pop(name, None)
        CHANNEL_MIXERS.pop(name, None)


def make(pattern, **fields):
    config = zoo.BackboneConfig(d_model=4, n_layers=len(pattern.split()), pattern=pattern, **fields)
    return zoo.Backbone(config, rngs=nnx.Rngs(0))


def rms_norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def test_a_grid_reaches_a_mixer_from_outside_alone_and_beside_others():
    x = normal(jax.random.key(0), 2, 6, 4)
    rows = RowMean(4, Options(), causal=False)(rms_norm(x), grid=(3, 2))
    assert_close(make("row_mean", causal=False)(x, grid=(3, 2)), rms_norm(x + rows))
    both = make("row_mean+row_mean[weight=2]", causal=False)
    assert_close(both(x, grid=(3, 2)), rms_norm(x + 3 * rows))
    with pytest.raises(ValueError, match=r"RowMean mixes images, expected grid=\(rows, columns\)"):
        both(x)


def test_an_image_classifier_gives_it_the_grid_and_refuses_a_class_token():
    fields = {"d_model": 4, "n_layers": 1, "pattern": "row_mean/ring", "image_size": 6, "patch_size": 2, "n_classes": 3}
    config = zoo.ImageClassifierConfig(**fields, class_token="none", pool="mean")
    model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
    hidden, loss = model.run(normal(jax.random.key(0), 1, 4, 6, 3))
    assert hidden.shape == (1, 6, 4)
    assert loss == 0.25
    with pytest.raises(ValueError, match="row_mean goes by rows and columns, expected class_token='none'"):
        zoo.ImageClassifierConfig(**fields)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_sequence_and_channel_mixers_add_to_the_loss_is_added_up(scan_layers):
    x, mask = normal(jax.random.key(0), 2, 6, 4), jnp.arange(6) < jnp.array([[4], [6]])
    backbone = make("penalised+penalised[weight=2] penalised penalised/ring", scan_layers=scan_layers)
    assert backbone.has_auxiliary_loss
    y, expected = x, 0.0
    for step in (3, 1, 1):
        normed = rms_norm(y)
        expected += step * jnp.mean(jnp.square(normed) * mask[..., None])
        y = y + (2 if step == 3 else 1) * normed
    y = y + 2 * rms_norm(y)
    actual, loss = backbone.run(x, mask=mask, grid=(3, 2))
    assert_close((actual[mask], loss), (rms_norm(y)[mask], expected + 0.25))
    assert not make("reader").has_auxiliary_loss


def test_an_encoder_adds_the_loss_of_one_that_reads_one_way():
    backbone = make("penalised", causal=False)
    x = normal(jax.random.key(0), 2, 6, 4)
    assert isinstance(backbone.layers[0].mixer, ssm.Bidirectional)
    assert_close(backbone.run(x)[1], jnp.mean(jnp.square(rms_norm(x))))


def test_depths_of_a_group_share_a_module_made_once():
    backbone = make("reader[group=1] reader reader[group=1]+reader")
    assert backbone.shared_names == ("table.1", "table.0")
    one, other = (table.rows[...] for table in backbone.shared)
    x = normal(jax.random.key(0), 2, 6, 4)
    expected = rms_norm(5 * x + 2 * one[0] + 2 * other[0])
    assert_close(backbone(x), expected)
    state = backbone.init_state(2)
    assert_close(state, (one[1], other[1], (one[1], other[1])))
    assert_close(backbone.extend(x, state)[0], expected)


def test_a_channel_mixer_shares_what_a_sequence_mixer_reads_too():
    class Added(Reader):
        def __call__(self, x, *, shared, embeddings, rngs=None):
            return embeddings + shared[self.shared_name(self.config)].rows[0]

    zoo.register_channel_mixer("other", Added, Options())
    backbone = make("-/other[group=1] reader/other")
    assert backbone.shared_names == ("table.1", "table.0")
    one, other = (table.rows[0] for table in backbone.shared)
    x = normal(jax.random.key(0), 2, 6, 4)
    assert_close(backbone(x), rms_norm(4 * x + one + 2 * other))


def test_a_language_model_trains_through_what_its_mixers_add():
    config = zoo.CausalLMConfig(d_model=4, n_layers=2, pattern="penalised reader", vocab_size=8)
    graphdef, params = nnx.split(zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    loss = lambda params: nnx.merge(graphdef, params).run(jnp.ones((1, 3), int))[1]  # noqa: E731
    gradients = jax.grad(loss)(params)
    assert jnp.any(gradients["backbone"]["layers"][0]["mixer"]["scale"][...] != 0)


@pytest.mark.parametrize(
    ("attributes", "fields", "message"),
    [
        ({"needs": ("gird",)}, {}, "other: unknown need 'gird', did you mean 'grid'?"),
        ({"needs": ("shared",)}, {}, "other: it needs 'shared' modules, expected a static method shared_name"),
        ({"needs": ("embeddings",)}, {"causal": False}, "other needs embeddings and reads one way, expected causal"),
        ({"has_norm": True}, {"norm_place": "post"}, "expected other alone in its block, causal, norms before it"),
        ({"has_norm": True}, {"pattern": "other+mamba"}, "expected other alone in its block"),
    ],
)
def test_a_config_names_what_a_stack_cannot_give(unchecked, attributes, fields, message):
    zoo.register_mixer("other", type("Other", (Penalised,), attributes), Options())
    with pytest.raises(ValueError, match=message):
        zoo.BackboneConfig(**{"pattern": "other"} | fields)


def test_options_may_say_what_the_class_does_not():
    assert needs_of(zoo.Attention, zoo.AttentionConfig()) == ("ahead", "positions")
    m2 = MIXERS["m2"]
    assert needs_of(m2.constructor, m2.config_default) == ()
    assert needs_of(m2.constructor, dataclasses.replace(m2.config_default, conv="2d")) == ("grid",)
    assert hand(None, ("mask",), {"mask": 1, "grid": 2}) == {"mask": 1}
