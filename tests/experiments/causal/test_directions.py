"""What a student's projections find alike beside its teacher's: what counts, and that equals have no distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import causal_lm
from experiments.causal.directions import check_alike, pattern, project, unlike
from experiments.causal.teaching import TaughtBatches, directed_loss, taught_loss
from experiments.loop.metrics import read_metrics
from tests.experiments.causal.test_teaching import FLAGS, write_model
from tests.numerics import assert_close
from tests.zoo.reuse.models import FAMILIES, IDS, causal

SEGMENTS = jnp.asarray([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 2, 2]])
WEIGHTS = jnp.asarray([[1.0, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]])


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def shapes(name):
    model = causal(name)  # it is kept: made outside of what is traced
    written = jax.eval_shape(lambda: project(model, IDS, jnp.zeros_like(IDS), None)[2])
    return {part.split("mixer.")[1]: array.shape[-1] for part, array in written.parts.items()}


def test_parts_are_what_each_mixer_says_that_it_writes():
    assert shapes("attn/mlp") == {"q_proj.0.0": 8, "k_proj.0.0": 8, "v_proj.0.0": 8}
    linear = {"q_proj.0.0": 8, "k_proj.0.0": 8, "v_proj.0.0": 8, "gate_proj.0.0": 8, "dt_proj.0.0": 2}
    assert shapes("linear_attn/moe") == linear
    assert shapes("m2/monarch") == {f"in_linear.0.{i}": 8 for i in range(3)}
    mamba = {"in_proj.0.0": 16, "in_proj.0.1": 16, "x_proj.0.0": 2, "x_proj.0.1": 4, "x_proj.0.2": 4}
    assert shapes("mamba") == mamba
    assert list(shapes("mamba2/mlp").values()) == [16, 16, 4, 4, 4]  # z x B C dt; no unit beside the state space
    assert sum(shapes("mamba3").values()) == causal("mamba3").backbone.layers[0].mixer.in_proj.kernel.shape[1]


def test_a_model_that_tells_computes_the_same_and_tells_what_its_maps_give():
    model = causal("attn/mlp")
    x = model.embed(IDS)
    hidden, _, written = project(model, IDS, jnp.zeros_like(IDS), None)
    assert_close(hidden, model.hidden(IDS))
    block = model.backbone.layers[0]
    assert_close(written.parts["backbone.layers.0.mixer.k_proj.0.0"], block.mixer.k_proj(block.norm(x)))
    assert_close(written.hidden[0], block(x))
    assert type(model.backbone.layers[0].mixer.k_proj) is nnx.Linear


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_and_computes_the_same(name):
    model = causal(name)
    graphdef, state = nnx.split(model)
    told = jax.jit(lambda state: project(nnx.merge(graphdef, state), IDS, SEGMENTS, None))(state)
    assert_close(told[0], jax.jit(lambda s: nnx.merge(graphdef, s).hidden(IDS, segment_ids=SEGMENTS))(state))
    assert len(told[2].hidden) == len(name.split())
    assert told[2].parts


def test_a_pattern_has_no_scale_and_knows_pairs_of_one_document_alone():
    F, together = draw(2, 7, 3), (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]).astype(jnp.float32)
    found = pattern(F, together)
    assert_close(pattern(7 * F, together), found)
    np.testing.assert_allclose(jnp.sum(found**2, axis=(1, 2)), 1, rtol=1e-6)
    assert np.all(np.asarray(found)[np.asarray(together) == 0] == 0)
    expected = np.asarray(F[0] @ F[0].T) * np.asarray(together[0])
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), rtol=1e-5)
    turned = F @ np.linalg.qr(np.asarray(draw(3, 3, seed=1)))[0]  # nor axes
    assert_close(pattern(turned, together), found)
    assert np.all(np.asarray(pattern(F, jnp.zeros_like(together))) == 0)


def test_positions_that_do_not_count_and_other_documents_change_nothing():
    written = project(causal("attn/mlp"), IDS, SEGMENTS, None)[2]
    counts = (WEIGHTS > 0)[..., None]
    other = jax.tree.map(lambda x: jnp.where(counts, x, 9.0), written)
    assert float(unlike(other, written, SEGMENTS, WEIGHTS)) == 0
    second = (SEGMENTS == 1)[..., None]
    turned = written._replace(parts={n: jnp.where(second, -x, x) for n, x in written.parts.items()})
    assert float(unlike(turned, written, SEGMENTS, WEIGHTS)) == 0
    assert float(unlike(turned, written, jnp.zeros_like(SEGMENTS), WEIGHTS)) > 0.1
    other = jax.tree.map(lambda x: jnp.where(counts, 9.0, x), written)
    assert float(unlike(other, written, SEGMENTS, WEIGHTS)) > 0.1


def test_equals_have_no_distance_and_no_gradient():
    model = causal("attn/mlp")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def distance(params, off):
        written = project(nnx.merge(graphdef, params, rest), IDS, SEGMENTS, None)[2]
        theirs = jax.tree.map(lambda x: x + off * jnp.cos(jnp.arange(x.size)).reshape(x.shape), written)
        return unlike(written, jax.lax.stop_gradient(theirs), SEGMENTS, WEIGHTS)

    run = jax.jit(jax.value_and_grad(distance))
    value, gradients = run(params, 0.0)
    assert float(value) == 0
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))
    value, gradients = run(params, 0.1)
    assert float(value) > 0
    moved = {".".join(map(str, path)): bool(np.any(g[...])) for path, g in nnx.to_flat_state(gradients)}
    assert moved["backbone.layers.0.mixer.k_proj.kernel"]
    assert moved["backbone.layers.0.mlp.down_proj.kernel"]  # hidden states
    assert not moved["backbone.norm_f.scale"]


def test_a_student_that_is_its_teacher_has_the_loss_of_none():
    class One:
        def __next__(self):
            return {"tokens": np.asarray(IDS), "segment_ids": np.asarray(SEGMENTS), "weights": np.asarray(WEIGHTS)}

    model = causal("attn/mlp")
    batch = jax.tree.map(jnp.asarray, next(TaughtBatches(One(), model, directions=True)))
    loss = directed_loss(model, batch, None, factor=2.0)
    plain = taught_loss(model, batch, None)
    np.testing.assert_allclose(loss.total, plain.total, atol=1e-5)
    assert float(loss.auxiliary) < 1e-8
    assert plain.auxiliary is None
    none = batch | {"weights": jnp.zeros_like(batch["weights"])}
    assert float(directed_loss(model, none, None, factor=2.0).auxiliary) == 0


def test_a_teacher_of_other_layers_is_refused(unchecked):
    deep, shallow = causal("attn/mlp attn/mlp"), causal("attn/mlp")
    with pytest.raises(ValueError, match="it has 2 layers, the model that it teaches 1"):
        check_alike("large", deep, shallow)
    with pytest.raises(ValueError, match=r"mixer.in_linear.0.0 is in one of the two models alone"):
        check_alike("large", causal("m2/monarch"), shallow)
    check_alike("large", shallow, shallow)


@pytest.mark.slow
def test_a_run_learns_directions_and_says_what_it_cannot(run_command, empty_folder):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    for seed, name in enumerate(("large", "small")):
        write_model(empty_folder / name, seed)
    options = [*FLAGS, "--teacher", "large", "--directions", "1", "--quantize.bits", "1", "--steps", "20"]
    status, _, err = run_command(causal_lm, *options)
    assert status == 0, err
    apart = [record["auxiliary_loss"] for record in read_metrics("run") if record["split"] == "train"]
    assert apart[-1] < apart[0]
    status, _, err = run_command(causal_lm, "tiny", "--directions", "1")
    assert (status, "--directions 1.0 without --teacher" in err) == (2, True)
