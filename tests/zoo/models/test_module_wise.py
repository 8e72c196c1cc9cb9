"""Modules of a student in their teacher's place: what each reads, what it gives, and what it learns from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from tests.numerics import assert_close, with_random_parameters
from zoo.models.build import build
from zoo.stack.parts import cut_in_parts

CONFIG = zoo.CausalLMConfig(
    d_model=8,
    n_layers=3,
    pattern="attn/mlp",
    vocab_size=16,
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=12),
    mamba=ssm.MambaConfig(d_state=4),
    mamba2=ssm.Mamba2Config(d_state=4, head_dim=4, chunk_size=4),
    monarch=m2.MonarchMLPConfig(d_ff=16),
    m2=m2.M2Config(l_max=16, filter=m2.HyenaFilterConfig(order=4)),
    moe=zoo.MoEConfig(n_experts=2, top_k=1, d_ff=8),
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 9)))
SEGMENTS = jnp.asarray([[0] * 4 + [1] * 5, [0] * 9])


def make(**options):
    return with_random_parameters(lambda: build(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0)))


def compared(teacher, student, **options):
    x = teacher.embed(IDS)
    return zoo.compare_modules(teacher.backbone, student.backbone, x, segment_ids=SEGMENTS, **options)


@pytest.mark.parametrize(
    ("pattern", "n_parts", "options"),
    [
        ("mamba/mlp", 3, {"first_norm": False, "scan_layers": True}),
        pytest.param("mamba attn/mlp mamba2/moe", 2, {}, marks=pytest.mark.slow),
        pytest.param("m2/monarch mamba:0.5 attn/mlp", 1, {}, marks=pytest.mark.slow),
    ],
)
def test_parts_one_after_the_other_are_the_stack(pattern, n_parts, options):
    backbone = make(pattern=pattern, **options).backbone
    x = start = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 8)), jnp.float32)
    mask = jnp.asarray([[True] * 9, [True] * 3 + [False] * 2 + [True] * 4])
    parts = cut_in_parts(backbone, n_parts)
    for part in parts:
        x = part(x, mask=mask)
    whole = backbone(start, mask=mask)
    assert_close(jnp.where(mask[..., None], backbone.norm_f(x), 0), jnp.where(mask[..., None], whole, 0))
    assert [len(part.layers) for part in parts] == {1: [3], 2: [1, 2], 3: [1, 1, 1]}[n_parts]


# With experts, one program computes the two in other orders.
@pytest.mark.parametrize(
    ("pattern", "rounding"), [("attn/mlp", 0), pytest.param("mamba2/moe", 1e-8, marks=pytest.mark.slow)]
)
def test_a_student_that_is_its_teacher_has_no_error_and_no_gradient(pattern, rounding):
    teacher = make(pattern=pattern, n_layers=2)
    graphdef, state = nnx.split(teacher)

    def error(state):
        return sum(
            jnp.sum((part.student - part.teacher) ** 2) for part in compared(teacher, nnx.merge(graphdef, state))
        )

    value, gradient = jax.jit(jax.value_and_grad(error))(state)
    assert value <= rounding
    assert all(np.max(np.abs(g)) <= 1e5 * rounding for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("pattern", ["attn", pytest.param("m2/monarch attn/mlp mamba2", marks=pytest.mark.slow)])
def test_a_module_learns_from_its_own_parameters_alone(pattern):
    teacher, student = make(n_layers=5), make(pattern=pattern)
    graphdef, state = nnx.split(student)

    def errors(state):
        parts = compared(teacher, nnx.merge(graphdef, state), n_modules=2)
        return jnp.stack([jnp.sum((part.student - part.teacher) ** 2) for part in parts])

    moves = set()
    for path, gradient in nnx.to_flat_state(jax.jit(jax.jacrev(errors))(state)):
        block = path[path.index("layers") + 1] if "layers" in path else None
        moves |= {(block, i) for i, g in enumerate(gradient[...]) if np.any(g)}
    assert moves == {(0, 0), (1, 1), (2, 1)}
    # The second part begins with the teacher's third block, whatever the student's first one does.
    first, second = compared(teacher, student, n_modules=2)
    states = teacher.backbone.hidden_states(teacher.embed(IDS), segment_ids=SEGMENTS)
    assert_close(first.teacher, states[2])
    assert_close(second.x, states[2])


def test_the_student_is_between_the_ends_of_its_teacher():
    teacher = make()
    student = build(dataclasses.replace(CONFIG, pattern="mamba/mlp", n_layers=2), rngs=nnx.Rngs(1))
    made, theirs, ours = (
        {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))}
        for model in (zoo.between_ends_of(teacher, student), teacher, student)
    )
    ends = {name for name in made if ".layers." not in name}
    assert ends == {"embedding.embedding", "backbone.norm_f.scale"}
    assert made.keys() == ours.keys()
    assert all(np.array_equal(value, (theirs if name in ends else ours)[name]) for name, value in made.items())
    assert not np.array_equal(theirs["embedding.embedding"], ours["embedding.embedding"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "mamba@a"}, "pattern='mamba@a' has blocks that depths share"),
        ({"d_model": 16}, "expected the teach"),
    ],
)
def test_a_student_that_cannot_stand_there_is_told_so(options, message):
    teacher, student = make(), build(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        compared(teacher, student)


def test_parts_and_ends_that_do_not_fit_are_told_so():
    teacher, other = make(), build(dataclasses.replace(CONFIG, vocab_size=40), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"embedding.embedding has shape \(40, 8\) in the student, expected the teach"):
        zoo.between_ends_of(teacher, other)
    with pytest.raises(ValueError, match="n_parts=4, expected 1 to 3, the number of blocks"):
        cut_in_parts(teacher.backbone, 4)
