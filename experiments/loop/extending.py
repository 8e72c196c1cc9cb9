"""What a run says that goes on with another length than before: its steps, its warm-up, its learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.loop.checkpoints import Restored
from experiments.loop.optim import OptimConfig, make_schedule, warmup_of


class Rate(NamedTuple):
    """The learning rate of a step that was taken."""

    step: int
    value: float


def learning_rate_of(restored: Restored, records: Sequence[Mapping[str, Any]]) -> Rate | None:
    """The learning rate with which a run came to its checkpoint; None where it is not known.

    Args:
      restored: the checkpoint. Those of earlier versions do not say it.
      records: of the run's metrics, which say it too, but maybe of an earlier step.
    """
    name = "learning_rate"
    if name in restored.metrics:
        return Rate(restored.step, restored.metrics[name])
    written = [r for r in records if r["split"] == "train" and name in r and r["step"] <= restored.step]
    return Rate(written[-1]["step"], written[-1][name]) if written else None


def said_of_length(done: int, steps: int) -> str:
    """What the line about a resumed run says where there is nothing left to train."""
    if done < steps:
        return ""
    if done == steps:
        return f": all {steps} steps are done"
    return f": {steps} steps are asked for and more are done, so nothing is trained; ask for more than {done} to go on"


def said_of_warmup(optim: OptimConfig, steps: int) -> str:
    """A line about a warm-up that is longer than the run; empty where it is not."""
    warmup = warmup_of(optim, steps)
    if warmup == optim.warmup_steps:
        return ""
    return f"a warm-up of {optim.warmup_steps} steps is longer than the run of {steps}: it is cut to {warmup}"


def said_of_rate(optim: OptimConfig, steps: int, before: Rate | None) -> str:
    """A line about a learning rate that jumps, as the schedule is that of another length; empty where it does not."""
    if before is None:
        return ""
    now = float(make_schedule(optim, steps)(before.step - 1))
    if math.isclose(before.value, now, rel_tol=1e-4, abs_tol=1e-12):
        return ""
    return (
        f"the schedule changes: at step {before.step} the learning rate was {before.value:.1e}, in a run of {steps} "
        f"steps it is {now:.1e}"
    )
