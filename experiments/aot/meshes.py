"""A training step cut over a mesh of devices that are not here.

program = train_on(find_target("v5p:2x2x2"), config, MeshConfig(fsdp=8), batch_size=8, seq_len=2048)
program.memory / 2**30     # GiB on each device
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.aot.programs import Program, compile_for, placed
from experiments.aot.steps import make_step
from experiments.aot.targets import Target
from experiments.loop.mesh import MeshConfig, make_mesh, sharding_of_batch
from experiments.loop.sharding import shardings_of_state
from zoo.models.build import ModelConfig, abstract


def train_on(
    target: Target, config: ModelConfig, mesh_config: MeshConfig, *, batch_size: int, seq_len: int, accumulate: int = 1
) -> Program:
    """The loop's training step of a model, compiled for a mesh of a target's devices.

    Args:
      target: from `find_target`.
      config: of the model; nothing of it is computed.
      mesh_config: how the devices stand.
      batch_size, seq_len, accumulate: as in `make_step`.

    Raises:
      UsageError: the target has more or fewer devices than the axes take.
    """
    mesh = make_mesh(mesh_config, target.devices)
    with jax.set_mesh(mesh):
        step = make_step(config, "train", batch_size=batch_size, seq_len=seq_len, accumulate=accumulate)
        state, rest, batch = step.arguments
        shardings = shardings_of_state(state, abstract(config), mesh)
        state = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, shardings)
        rest = placed(rest, NamedSharding(mesh, PartitionSpec()))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of_batch(mesh, x.shape)), batch
        )
        return compile_for(target, step.program, state, rest, batch)
