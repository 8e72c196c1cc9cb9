"""The table of operations: what it would compile can be traced."""

import math

import jax
import pytest

from experiments.aot import operations
from experiments.loop import flags


@pytest.mark.parametrize("i", range(len(operations.OPERATIONS)), ids=lambda i: operations.OPERATIONS[i].name)
def test_every_operation_takes_its_arguments(i):
    function, shapes = operations.Item(i, "forward", 36, 2).build()
    y, *_ = jax.tree.leaves(jax.eval_shape(function, shapes))
    assert y.shape[0] == 2
    positions = y.shape[1:3] if operations.OPERATIONS[i].name == "images' convolution" else y.shape[1:2]
    assert (math.prod(positions) == 36) == (not operations.OPERATIONS[i].step)


def test_a_gradient_is_in_every_argument():
    function, shapes = operations.Item(0, "gradient", 32, 2).build()
    assert jax.tree.map(lambda x: x.shape, jax.eval_shape(function, shapes)) == {k: x.shape for k, x in shapes.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "sdd"], "sdd matches none of: selective scan"), (["--passes", "back"], "back")],
)
def test_errors_name_the_flag(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["operations", *arguments])
    with pytest.raises(flags.UsageError, match=message):
        operations.main()
