"""Which checkpoint a run can go on from after its loss has stopped being finite.

A learning rate that is far too high ruins the parameters a step or more before the loss is no number any more, and a
checkpoint may have been saved in between. So when the loss is no number, a step is tried from the newest checkpoint,
on a batch that had gone well: if that fails, it is the checkpoint that is bad, and not the batch. Then it is set aside
and the one before is tried. Nothing of this costs anything while all goes well.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.loop.checkpoints import Checkpoints

# A checkpoint whose loss is so many times that of the run's first step is as good as none.
_FAR_ABOVE = 10


class StepBack(NamedTuple):
    """What has been found."""

    good: int | None
    """The newest checkpoint that can be gone on from, if there is one."""
    diverged: tuple[int, ...]
    """Newer ones, set aside; where none is good, all, where they are."""

    def __str__(self) -> str:
        if self.good is None:
            if not self.diverged:
                return "no checkpoint yet"
            return f"no checkpoint to go on from: {_steps(self.diverged)} had diverged before"
        aside = f", for {_steps(self.diverged)} had diverged before; set aside" if self.diverged else ""
        return f"the last good checkpoint is step {self.good}{aside}"


def step_back(checkpoints: Checkpoints, like: Any, try_step: Callable[[Any], float], first_loss: float) -> StepBack:
    """Finds the newest checkpoint from which a step goes well, and sets aside those that are newer.

    Args:
      checkpoints: of the run.
      like: as in `Checkpoints.restore_latest`.
      try_step: try_step(state of a checkpoint) gives the loss of a step from there; not finite where that or its
        gradient is not.
      first_loss: that of the run's first step.
    """
    diverged: list[int] = []
    for step in reversed(checkpoints.steps()):
        restored = checkpoints.restore(step, like)
        if restored is None:  # damaged, and set aside as that
            continue
        loss = try_step(restored.state)
        if math.isfinite(loss) and loss <= _FAR_ABOVE * first_loss + 1:
            for bad in diverged:
                checkpoints.set_aside(bad, "diverged")
            return StepBack(step, tuple(diverged))
        diverged.append(step)
    return StepBack(None, tuple(diverged))


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, sorted(steps)))}"
