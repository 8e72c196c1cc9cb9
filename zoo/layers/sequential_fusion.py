"""MultiModN's sequential fusion: a state that each modality changes in turn, and that stays where one is missing.

    s_0 learned        s_i = f_i(s_{i-1}, x_i) where modality i is there, else s_{i-1}

A task reads any of these states: a prediction after each modality says what that one added. What is missing is skipped
exactly, in value and gradient, whatever stands in its place: nothing is imputed, and that it was absent is not learned.

Axes: m modalities, t tasks, s width of the state, d width of a modality, o outputs of a task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from zoo.layers.linear import linear
from zoo.layers.rngs import Seed, as_rngs


class FusionStep(nnx.Module):
    """An MLP of the state and a modality's features, which gives the next state.

    Args:
      d_state: width of the state.
      d_in: width of the features.
      d_hidden: width between its two maps. None: the state's.
      dtype: of the computation.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".
    """

    def __init__(
        self,
        d_state: int,
        d_in: int,
        d_hidden: int | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"bias": True, "init": "uniform", "dtype": dtype, "param_dtype": param_dtype}
        self.d_in = d_in
        self.fc1 = linear(d_state + d_in, d_hidden or d_state, rngs=rngs, **options)
        self.fc2 = linear(d_hidden or d_state, d_state, rngs=rngs, **options)

    def __call__(self, state: Float[Array, "b s"], x: Float[Array, "b d"]) -> Float[Array, "b s"]:
        """The state behind a modality."""
        return self.fc2(jax.nn.relu(self.fc1(jnp.concatenate([state, x.astype(state.dtype)], axis=-1))))


class Fused(NamedTuple):
    """What a fusion gives.

    Examples:
      >>> fused = zoo.SequentialFusion({"image": 8}, {"class": 3}, d_state=16, rngs=0)({"image": jnp.ones((2, 8))})
      >>> fused.change.shape, fused.there.shape
      ((), (2, 1))
    """

    states: Float[Array, "b m s"]
    """Before the first modality, and behind each of them: one more than there are."""
    outputs: dict[str, Float[Array, "b m o"]]
    """What each task reads from each state."""
    there: Bool[Array, "b m"]
    """Which modality was there, in their order."""

    @property
    def change(self) -> Float[Array, ""]:
        """Mean square of what the modalities that are there change: a regulariser of the paper."""
        square = jnp.mean(jnp.square(jnp.diff(self.states, axis=1)), axis=-1)
        return jnp.sum(jnp.where(self.there, square, 0)) / jnp.maximum(jnp.sum(self.there), 1)


class SequentialFusion(nnx.Module):
    """Modalities in turn change a state from which tasks are read; missing ones are skipped exactly.

    Args:
      inputs: width of each modality's features by its name, in the order in which they come; or a module that is called
        with (state, features) and gives the next state, for any other kind of features.
      outputs: outputs of each task by its name.
      d_state: width of the state.
      d_hidden: width inside the steps. None: the state's.
      dtype: of the computation.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params", or a seed.

    Raises:
      ValueError: no modality.

    Examples:
      >>> fusion = zoo.SequentialFusion({"image": 8, "text": 4}, {"class": 3}, d_state=16, rngs=0)
      >>> image, text = jnp.ones((2, 8)), jnp.ones((2, 4))
      >>> fused = fusion({"image": image, "text": text}, {"text": jnp.array([True, False])})
      >>> fused.states.shape, fused.outputs["class"].shape  # before both, behind the image, behind the text
      ((2, 3, 16), (2, 3, 3))
      >>> bool((fused.states[1, 1] == fused.states[1, 2]).all())  # a row without text
      True

    Source: Swamy et al. 2023, arXiv:2309.14118 (MultiModN), section 3.
    """

    def __init__(
        self,
        inputs: Mapping[str, int | Callable[..., Any]],
        outputs: Mapping[str, int],
        *,
        d_state: int,
        d_hidden: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: Seed,
    ):
        if not inputs:
            raise ValueError("inputs={}, expected at least one modality")
        rngs = as_rngs(rngs)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.names = tuple(inputs)
        self.initial = nnx.Param(jax.random.normal(rngs.params(), (d_state,), param_dtype) * 0.02, decay=False)
        steps = [FusionStep(d_state, i, d_hidden, **options) if isinstance(i, int) else i for i in inputs.values()]
        self.steps = nnx.List(steps)
        self.tasks = tuple(outputs)
        self.heads = nnx.List([linear(d_state, n, bias=True, init="uniform", **options) for n in outputs.values()])

    def __call__(
        self,
        features: Mapping[str, Any],
        there: Mapping[str, Bool[Array, "b"]] | None = None,
        *,
        order: Sequence[str] | None = None,
    ) -> Fused:
        """The states and what the tasks read from each.

        Args:
          features: of each modality, rows first. One that is not named is missing in all rows.
          there: False for rows that lack a modality, whose features may be anything. Not named: all rows have it.
          order: modalities in the order in which they come. None: that of `inputs`.

        Raises:
          ValueError: names of modalities that there are not, or none; an order with one twice; other numbers of rows,
            or another width, than expected.
        """
        there, order = there or {}, tuple(order or self.names)
        for what, names in (("features", features), ("there", there), ("order", order)):
            if unknown := [name for name in names if name not in self.names]:
                raise ValueError(f"{what} names {unknown[0]!r}, expected some of {', '.join(self.names)}")
        if len(set(order)) < len(order):
            raise ValueError(f"order={order}, expected each modality once at most")
        if not features:
            raise ValueError(f"features={{}}, expected some of {', '.join(self.names)}")
        rows = jax.tree.leaves(next(iter(features.values())))[0].shape[0]
        self._check(features, there, rows)
        state = jnp.broadcast_to(self.initial[...], (rows, self.initial.shape[0]))
        states, seen = [state], []
        for name in order:
            here = jnp.broadcast_to(jnp.asarray(there.get(name, True)), (rows,)) if name in features else None
            if here is not None:
                state = self._step(name, state, features[name], here)
            states.append(state)
            seen.append(jnp.zeros((rows,), bool) if here is None else here)
        stacked = jnp.stack(states, axis=1)
        read = {task: head(stacked) for task, head in zip(self.tasks, self.heads, strict=True)}
        return Fused(stacked, read, jnp.stack(seen, axis=1))

    def _check(self, features, there, rows):
        """Raises a ValueError where features, or what is there, have other shapes than expected: no row is repeated."""
        for name, given in features.items():
            if any(x.ndim < 1 or x.shape[0] != rows for x in jax.tree.leaves(given)):
                shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(given))
                raise ValueError(f"features[{name!r}] have shape {shapes}, expected {rows} rows, as the first have")
            step = self.steps[self.names.index(name)]
            if isinstance(step, FusionStep) and getattr(given, "shape", None) != (rows, step.d_in):
                expected = f"({rows}, {step.d_in})"
                raise ValueError(f"features[{name!r}] have shape {getattr(given, 'shape', None)}, expected {expected}")
        for name, given in there.items():
            is_there = jnp.asarray(given)
            if is_there.dtype != bool or is_there.shape not in ((), (rows,)):
                found = f"{is_there.dtype}{list(is_there.shape)}"
                raise ValueError(f"there[{name!r}] is {found}, expected truth values of {rows} rows")

    def _step(self, name: str, state, features, here):
        """The state behind a modality, for rows that have it."""
        # What is missing may be NaN: none of it enters, or its gradient would be NaN even where it is not chosen.
        known = jax.tree.map(lambda x: jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), x, 0), features)
        new = self.steps[self.names.index(name)](state, known)
        return jnp.where(here[:, None], new.astype(state.dtype), state)
