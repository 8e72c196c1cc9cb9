"""Checks: what they learn, and what they say."""

import jax.numpy as jnp
import pytest

from ssm.checks import check_shapes, count_heads


def test_returns_the_size_of_every_axis():
    assert check_shapes(u=(jnp.zeros((2, 5, 8)), "b l e"), A=(jnp.zeros((8, 4)), "e n")) == {
        "b": 2,
        "l": 5,
        "e": 8,
        "n": 4,
    }


def test_passes_over_what_is_not_given():
    assert check_shapes(u=(jnp.zeros((2, 5)), "b l"), mask=(None, "b s")) == {"b": 2, "l": 5}


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 5, 8), "b l n", r"^B has shape \(2, 5, 8\), expected \(b, l, n\) with b=2, l=3$"),
        ((2, 3), "b l n", r"^B has shape \(2, 3\), expected \(b, l, n\) with b=2, l=3$"),
        ((4, 5), "h p p", r"^B has shape \(4, 5\), expected \(h, p, p\)$"),
        ((4, 5), "p p", r"^B has shape \(4, 5\), expected \(p, p\)$"),
    ],
)
def test_errors_say_what_was_given_and_what_earlier_arguments_ask_for(shape, axes, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(u=(jnp.zeros((2, 3)), "b l"), B=(jnp.zeros(shape), axes))


@pytest.mark.parametrize(
    ("width", "head_dim", "n_groups", "message"),
    [
        (12, 5, 1, "^head_dim=5 must divide the width, 12$"),
        (0, 4, 1, "^head_dim=4 must divide the width, 0$"),
        (20, 4, 1, "^head_dim=4 must divide the width, 20$"),  # more than there is room for
        (12, 4, 2, "^n_groups=2 must divide the 3 heads$"),
    ],
)
def test_heads_make_up_a_width_in_groups_of_as_many(width, head_dim, n_groups, message):
    assert count_heads(12, 4, 3, most=16, named="") == 3
    with pytest.raises(ValueError, match=message):
        count_heads(width, head_dim, n_groups, most=16, named=f"the width, {width}")
