"""The programs of a model that are worth compiling ahead of time, as functions and shapes; nothing is computed.

train      the loop's own step: gradient, optimiser, donated state
decode     a causal language model's next token, from a donated state
forward    logits of a batch: of all tokens, or of images
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import zoo
from experiments.aot.programs import placed
from experiments.causal.next_token import next_token_loss
from experiments.encoders.masked_loss import masked_loss
from experiments.encoders.masking import MaskingConfig
from experiments.loop.mesh import check_rows, everywhere, sharding_of_batch
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.sharding import shardings_of_state
from experiments.loop.train import LossFunction, init_state, make_train_step, split_model
from experiments.vision.task import image_loss
from zoo.models.build import Model, ModelConfig, abstract

What = Literal["train", "decode", "forward"]
Shape = jax.ShapeDtypeStruct


class Step(NamedTuple):
    """A program to compile: program(*arguments), on the mesh."""

    program: Callable
    """A jitted function."""
    arguments: tuple[Any, ...]
    """Shapes, with their places on the mesh."""
    tokens: int
    """Tokens, or images, that it goes through."""


def make_step(
    config: ModelConfig, mesh: Mesh, what: What = "train", *, batch_size: int, seq_len: int = 0, accumulate: int = 1
) -> Step:
    """A program of a model with this config.

    Args:
      config: of a causal or masked language model, or of an image classifier.
      mesh: from `loop.mesh.make_mesh`: parameters, the optimiser's state and the batch lie over it as in training.
      what: "train", "decode" or "forward".
      batch_size: rows, over all devices and micro-batches.
      seq_len: tokens of a row, of language models; in decoding, those that the state has room for.
      accumulate: micro-batches of a training step.

    Raises:
      ValueError: a model that has no such program, or none of these kinds; or rows that cannot be shared out.
    """
    if what not in get_args(What):
        raise ValueError(f"what={what!r}, expected one of {', '.join(get_args(What))}")
    if what == "decode" and not isinstance(config, zoo.CausalLMConfig):
        raise ValueError(f"what='decode' with a {type(config).__name__}, expected a CausalLMConfig")
    check_rows(mesh, batch_size, accumulate)
    model = abstract(config)
    if what == "train":
        return _train(model, mesh, batch_size, seq_len, accumulate)
    graphdef, variables = nnx.split(model)
    variables = placed(variables, everywhere(mesh))
    if what == "forward":
        inputs = _rows(batch_of(config, batch_size, seq_len), mesh)

        def forward(variables, batch):
            model = nnx.merge(graphdef, variables)
            return model(batch["images"]) if "images" in batch else model(batch["tokens"], batch.get("mask"))

        return Step(jax.jit(forward), (variables, inputs), _tokens(config, batch_size, seq_len))

    def begin(variables):
        merged: Any = nnx.merge(graphdef, variables)
        return merged.init_state(batch_size, seq_len)

    def decode(variables, ids, state):
        return nnx.merge(graphdef, variables).extend(ids, state)

    given = _rows((Shape((batch_size, 1), jnp.int32), jax.eval_shape(begin, variables)), mesh)
    return Step(jax.jit(decode, donate_argnums=2), (variables, *given), batch_size)


def _train(model: Model, mesh: Mesh, batch_size: int, seq_len: int, accumulate: int) -> Step:
    config = model.config
    loss: LossFunction = next_token_loss if isinstance(config, zoo.CausalLMConfig) else masked_loss
    if isinstance(config, zoo.ImageClassifierConfig):
        loss = functools.partial(image_loss, smoothing=0.1)
    optimizer = make_optimizer(OptimConfig(), 1000, model)
    step = make_train_step(model, loss, optimizer, accumulate=accumulate)
    graphdef, params, rest = split_model(model)

    def start(params, rest):
        return init_state(nnx.merge(graphdef, params, rest), optimizer, jax.random.key(0))

    state = jax.eval_shape(start, params, rest)
    state = jax.tree.map(placed, state, shardings_of_state(state, model, mesh))
    batch = _rows(batch_of(config, batch_size, seq_len), mesh)
    return Step(step.program, (state, placed(step.rest, everywhere(mesh)), batch), _tokens(config, batch_size, seq_len))


def _rows(tree: Any, mesh: Mesh) -> Any:
    """Shapes whose first axis is the batch's, cut over the mesh as batches are."""
    return jax.tree.map(lambda x: placed(x, sharding_of_batch(mesh, x.shape)), tree)


def batch_of(config: ModelConfig, batch_size: int, seq_len: int = 0) -> dict[str, Shape]:
    """The arrays of a training batch, as the experiments make it.

    Raises:
      ValueError: a model of another kind.
    """

    def array(dtype, *more):
        return Shape((batch_size, *more), dtype)

    if isinstance(config, zoo.ImageClassifierConfig):
        size = config.image_size
        images = {"images": array(jnp.float32, size, size, config.channels), "share": array(jnp.float32)}
        return images | {"labels": array(jnp.int32), "partners": array(jnp.int32)}
    if not isinstance(config, zoo.CausalLMConfig | zoo.MaskedLMConfig):
        raise ValueError(f"a {type(config).__name__}, expected a language model or an image classifier")
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}, expected at least 1")
    tokens = {"tokens": array(jnp.int32, seq_len)}
    if isinstance(config, zoo.CausalLMConfig):
        more = {"targets": array(jnp.int32, seq_len), "weights": array(jnp.float32, seq_len)}
        return tokens | more | {name: array(jnp.int32, seq_len) for name in ("segment_ids", "positions")}
    hidden = max(1, round(MaskingConfig().rate * seq_len))
    more = {"targets": array(jnp.int32, hidden), "weights": array(jnp.float32, hidden)}
    return tokens | more | {"positions": array(jnp.int32, hidden), "mask": array(jnp.bool_, seq_len)}


def _tokens(config: ModelConfig, batch_size: int, seq_len: int) -> int:
    return batch_size * (1 if isinstance(config, zoo.ImageClassifierConfig) else seq_len)
