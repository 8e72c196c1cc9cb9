"""Module by module: parts of a student that stand, each by itself, in the place of their teacher's.

Teacher and student are cut into as many runs of blocks, whatever their mixers and however many blocks they have; the
student's run i reads what enters the teacher's run i, and is to give what comes behind that. So no part waits for
another, and no error of a lower one reaches a higher one. `experiments.causal.module_wise` trains them so.

Source: Lo et al. 2024, arXiv:2402.16918 (m2mKD), section 3.2; Ni et al. 2022, arXiv:2212.04129 (Deep Incubation), for
modules that are trained by themselves and put together.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zoo.stack.backbone import Backbone
from zoo.stack.parts import cut_in_parts

Model = TypeVar("Model", bound=nnx.Module)


class ComparedModule(NamedTuple):
    """A part of the student and the teacher's, both fed what enters the teacher's.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="mamba")
      >>> model = zoo.CausalLM(config, rngs=0)
      >>> [one, two] = zoo.compare_modules(model.backbone, model.backbone, jnp.ones((1, 4, 16)))
      >>> bool((two.x == one.teacher).all()), bool((one.student == one.teacher).all())
      (True, True)
    """

    x: Float[Array, "b l d"]
    """What enters."""
    teacher: Float[Array, "b l d"]
    """What comes behind the teacher's last block of the part."""
    student: Float[Array, "b l d"]
    """What comes behind the student's."""
    loss: Float[Array, ""]
    """What training adds to its loss for the student's mixers."""


def compare_modules(
    teacher: Backbone,
    student: Backbone,
    x: Float[Array, "b l d"],
    *,
    n_modules: int | None = None,
    rngs: nnx.Rngs | None = None,
    **given: Any,
) -> list[ComparedModule]:
    """Runs the teacher, and each part of the student on what enters the teacher's. Nothing is learned of the teacher.

    Args:
      teacher, student: of one width; with any mixers, and any numbers of blocks.
      x: what both are called with.
      n_modules: parts. None: as many as the smaller one has blocks.
      rngs: as in `Backbone`, for the student.
      **given: mask, segment_ids and so on, as `Backbone` takes them.

    Returns:
      The parts, in order.

    Raises:
      ValueError: another width; more parts than blocks; or stacks that cannot be cut, see `zoo.stack.parts`.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=4, pattern="mamba")
      >>> teacher = zoo.CausalLM(config, rngs=0).backbone
      >>> student = zoo.Backbone(zoo.BackboneConfig(d_model=16, n_layers=2, pattern="m2/monarch"), rngs=0)
      >>> [part.student.shape for part in zoo.compare_modules(teacher, student, jnp.ones((1, 4, 16)))]
      [(1, 4, 16), (1, 4, 16)]
    """
    check_widths(teacher, student)
    n = min(len(teacher.words), len(student.words)) if n_modules is None else n_modules
    compared = []
    for theirs, ours in zip(cut_in_parts(teacher, n), cut_in_parts(student, n), strict=True):
        out = jax.lax.stop_gradient(theirs(x, **given))
        y, loss = ours.run(x, rngs=rngs, **given)
        compared.append(ComparedModule(x, out, y, loss))
        x = out
    return compared


def check_widths(teacher: Backbone, student: Backbone) -> None:
    """Raises a ValueError where a part of the one cannot stand in a place of the other's."""
    if teacher.config.d_model != student.config.d_model:
        raise ValueError(f"d_model={student.config.d_model}, expected the teacher's, {teacher.config.d_model}")


def between_ends_of(teacher: Model, student: Model) -> Model:
    """The student's blocks between copies of the teacher's embedding, final norm and head; both stay as they are.

    Raises:
      ValueError: what is not in the blocks has other names or shapes in the two.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=2, pattern="mamba")
      >>> one, two = zoo.CausalLM(config, rngs=0), zoo.CausalLM(config, rngs=1)
      >>> bool((zoo.between_ends_of(one, two).embedding.embedding[...] == one.embedding.embedding[...]).all())
      True
    """
    theirs, ours = (_ends(model) for model in (teacher, student))
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [None if name not in ends else ends[name][1].shape for ends in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has shape {shapes[1]} in the student, expected the teacher's, {shapes[0]}: embedding, final "
                "norm and head are the teacher's"
            )
    graphdef, state = nnx.split(student)
    of_teacher = dict(theirs.values())
    flat = [
        (path, variable.replace(jnp.array(of_teacher[path][...])) if path in of_teacher else variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _ends(model: nnx.Module) -> dict[str, tuple[Any, nnx.Variable]]:
    """All parameters that are in no block, by name: (path, variable)."""
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(model))}
    return {name: each for name, each in flat.items() if ".layers." not in f".{name}"}
