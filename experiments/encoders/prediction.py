"""What a model's head answers for rows, batch by batch."""

import functools
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.encoders.objectives import LabelledRows, Objective
from experiments.loop.mesh import current_mesh, gathered, placed, spread_whole

# Batches that the device is given ahead of those whose answers have come back.
AHEAD = 8


def run_over(
    model: Any, objective: Objective, rows: LabelledRows, batch_size: int, *, progress: bool = False
) -> tuple[float, list[np.ndarray]]:
    """The mean loss over rows (nan without labels), and the logits of each, in their order.

    Args:
      progress: whether to show a bar on stderr, where that is a terminal.
    """
    graphdef, variables = nnx.split(model)
    mesh = current_mesh()
    variables = placed(variables, mesh)
    order = list(rows.texts.in_order_of_length(batch_size))
    outputs: list[Any] = []
    bar = tqdm(total=len(rows), unit="text", dynamic_ncols=True, disable=not (progress and sys.stderr.isatty()))
    with bar, jax.set_mesh(mesh):
        for batch in order:
            outputs.append(_outputs(graphdef, variables, spread_whole(rows(batch), mesh), objective.outputs))
            if len(outputs) > AHEAD:
                outputs[-1 - AHEAD] = gathered(outputs[-1 - AHEAD])
            bar.update(int((batch >= 0).sum()))
    outputs = gathered(outputs)
    total, weight = (sum(float(loss[i]) for loss, _ in outputs) for i in (0, 1))
    logits = {
        int(row): values
        for batch, (_, batch_logits) in zip(order, outputs, strict=True)
        for row, values in zip(batch, batch_logits, strict=True)
        if row >= 0
    }
    return total / weight if weight else float("nan"), [logits[row] for row in range(len(rows))]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _outputs(graphdef, variables, batch, function):
    return function(nnx.merge(graphdef, variables), batch, None)
