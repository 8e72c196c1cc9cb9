"""Training in few bits: a model is read in rounded weights, and what the gradient says of these is done to the floats.

    loss(zoo.straight_through(model, bits=4), batch)          the loss of zoo.quantize(model, bits=4), to be trained

    w_hat = scale * code of w        dL/dw = dL/dw_hat

Rounding has no slope but 0, so its gradient is taken as if it were not there (straight through). The parameters stay
floats, which steps too small to change a code add up in; optimisers and checkpoints know nothing of bits.

Source: Shen et al. 2019, arXiv:1909.05840, section 3 (fine-tuning of few bits); Bengio et al. 2013, arXiv:1308.3432,
section 4 (the estimator); Qin et al. 2022, arXiv:2203.06390, section 3 (1 bit: signs and mean sizes). Nothing is
clipped here: BiBERT's gradient is 0 where a weight is beyond 1, and weights here are far smaller; scales follow the
weights at every step and have no gradient of their own.
"""

from jax import lax

from zoo.models.frozen import copied
from zoo.reuse.codes import Bits, rounded
from zoo.reuse.linear_maps import Model
from zoo.reuse.quantize import bits_of, maps_to_round


def straight_through(
    model: Model, *, bits: Bits, group_size: int | None = 64, targets: str | None = None, embeddings: bool = False
) -> Model:
    """A model with the weights that `zoo.quantize` of the same options has, whose gradient goes on to the given one's.

    Parameters stay `nnx.Param`s of the same shapes and dtypes, so that it may stand in a loss, inside `jax.grad` and
    `jax.jit`. The given model stays as it is.

    Args:
      model: any module with linear maps, of parameters.
      bits, group_size, targets, embeddings: as of `zoo.quantize`, which rounds each weight alone here.

    Raises:
      ValueError: as `zoo.quantize`: other bits; group_size below 1; nothing that `targets` names; a map that is
        quantised or adapted already.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> graphdef, params = nnx.split(model, nnx.Param)
      >>> def loss(params):
      ...     model = zoo.straight_through(nnx.merge(graphdef, params), bits=4, group_size=16)
      ...     return jnp.mean(model(jnp.ones((1, 3), jnp.int32)) ** 2)
      >>> gradients = jax.jit(jax.grad(loss))(params)
      >>> bool(jnp.any(gradients.backbone.layers[0].mixer.in_proj.kernel[...]))
      True
    """
    model = copied(model)
    maps = maps_to_round(model, bits=bits, group_size=group_size, targets=targets, embeddings=embeddings)
    for linear in maps.values():
        weight = linear.weight[...]
        small = rounded(lax.stop_gradient(weight), linear.axes, bits=bits_of(linear, bits), group_size=group_size)
        # w - w is 0 exactly, with the slope of w.
        linear.replace(linear.weight.replace(small + (weight - lax.stop_gradient(weight))))
    return model
