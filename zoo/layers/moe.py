"""Mixture of experts: a channel mixer whose every position goes through a few of many perceptrons.

A router gives each position `top_k` of `n_experts`. The positions of an expert are laid out in blocks of rows next to
each other, so that work grows with top_k and not with n_experts; `grouped_matmul.py` multiplies them.

Axis letters: `e` experts · `s` the experts chosen at a position · `c` blocks of `q` rows · `r` rows, before or behind.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from m2.mlp import ACTIVATIONS
from zoo.layers.grouped_matmul import grouped_matmul
from zoo.layers.linear import linear
from zoo.layers.mlp import MLP, MLPConfig
from zoo.layers.names import unknown_name

Weights = Literal["renormalised", "softmax", "unit", "sigmoid", "sigmoid_renormalised"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Options of the mixture of experts. The defaults are Mixtral's: 8 SwiGLUs, 2 a position, none dropped."""

    n_experts: int = 8
    """Experts that the router chooses from."""
    top_k: int = 2
    """Experts that a position goes through."""
    d_ff: int | None = None
    """Hidden width of each expert. None: as that of "mlp", 8/3 d_model when gated, 4 d_model otherwise."""
    gated: bool = True
    """Whether the hidden layer is a product of two projections (GLU)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Non-linearity of the hidden layer, or of its gate."""
    bias: bool = False
    """Whether the experts' projections have biases. The router has none."""
    out_bias: bool | None = None
    """Whether the output projection has one. None: as `bias` says."""
    dropout: float = 0.0
    """Share of the hidden layer that is dropped in training."""
    weights: Weights = "renormalised"
    """What a chosen expert counts: its softmax over those chosen (Mixtral, Granite), over all ("softmax": Switch,
    Jamba, Qwen2-MoE), or 1 ("unit": a perceptron cut up; the router then learns from the auxiliary losses alone); or
    its sigmoid, as it is, or over the sum of those chosen ("sigmoid_renormalised": DeepSeek-V3, Nemotron-3)."""
    weights_scale: float = 1.0
    """Multiplies what every chosen expert counts."""
    correction: bool = False
    """Whether each expert has a bias that is added to its softmax or sigmoid to choose by, and for nothing else
    (DeepSeek-V3). Training lowers those of experts that have more than their share to do (`correction_loss`)."""
    n_groups: int = 1
    """Groups of neighbouring experts. A position chooses among those of `top_groups` groups: the ones whose best two
    experts have the largest sums."""
    top_groups: int = 1
    """How many of the groups."""
    d_latent: int | None = None
    """Width that the input is projected to before the experts that are chosen, and back behind them. None: neither."""
    n_shared: int = 0
    """Experts besides, which every position goes through (DeepSeek, Nemotron-3)."""
    d_ff_shared: int | None = None
    """Hidden width of each of those. None: that of the others."""
    shared_gate: bool = False
    """Whether what they give is multiplied with a sigmoid of the position (Qwen2-MoE)."""
    capacity_factor: float | None = None
    """None: an expert takes all that come. A number: of each row it takes this many times its even share, rounded up,
    earlier positions first, and those that come later go without it."""
    balance_weight: float = 0.01
    """Weight, in training, of the loss that is least where all experts have as much to do (`balance_loss`)."""
    z_weight: float = 0.0
    """Weight, likewise, of the loss that keeps the router's logits small (`z_loss`). ST-MoE's is 0.001."""
    correction_weight: float = 0.01
    """Weight, likewise, of what moves the biases of correction=True (`correction_loss`). 0: they stay as they are."""

    def __post_init__(self):
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k={self.top_k}, expected 1 to n_experts={self.n_experts}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))
        if self.weights not in get_args(Weights):
            raise ValueError(unknown_name("weights", self.weights, get_args(Weights)))
        for name in ("d_ff", "d_ff_shared", "d_latent"):
            if (width := getattr(self, name)) is not None and width < 1:
                raise ValueError(f"{name}={width}, expected None or at least 1")
        if self.n_experts % self.n_groups or not 1 <= self.top_groups <= self.n_groups:
            raise ValueError(
                f"n_groups={self.n_groups} and top_groups={self.top_groups}, expected a divisor of "
                f"n_experts={self.n_experts}, and 1 to as many"
            )
        if self.top_k > self.top_groups * (self.n_experts // self.n_groups):
            raise ValueError(f"top_k={self.top_k}, more than there are experts in top_groups={self.top_groups} groups")
        if self.n_shared < 0:
            raise ValueError(f"n_shared={self.n_shared}, expected at least 0")
        if self.shared_gate and not self.n_shared:
            raise ValueError("shared_gate=True with n_shared=0: there is nothing to multiply")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected 0 <= dropout < 1")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor={self.capacity_factor}, expected None or more than 0")
        for name in ("balance_weight", "z_weight", "correction_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 0")

    def expert(self) -> MLPConfig:
        """One expert as a dense perceptron."""
        names = ("d_ff", "gated", "activation", "bias", "out_bias", "dropout")
        return MLPConfig(**{name: getattr(self, name) for name in names})

    def shared(self, d_model: int) -> MLPConfig | None:
        """The shared experts as one dense perceptron, since the sum of n is one of n times the width, or None."""
        expert = self.expert()
        width = self.n_shared * (self.d_ff_shared or expert.width(d_model))
        return dataclasses.replace(expert, d_ff=width) if width else None


def choose(
    logits: Float[Array, "*b e"],
    top_k: int,
    weights: Weights = "renormalised",
    *,
    correction: Float[Array, "e"] | None = None,
    n_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Int[Array, "*b s"], Float[Array, "*b s"]]:
    """The experts of each position, the likeliest first, and what each counts.

        renormalised          softmax over the chosen = softmax over all, the chosen divided by their sum
        softmax               softmax over all
        unit                  1
        sigmoid               sigmoid
        sigmoid_renormalised  sigmoid, divided by the sum of the chosen

    Args:
      logits: of the router, at least float32.
      top_k: how many are chosen. Of equal ones the first is.
      weights: one of these.
      correction: what is added to the softmax or sigmoid of each expert, to choose by alone. None: nothing.
      n_groups: groups of neighbouring experts, of which a position keeps `top_groups`.
      top_groups: those whose best two experts have, so corrected, the largest sums.

    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1 (renormalised); Fedus et al. 2021, arXiv:2101.03961,
      eq. 1-2 (softmax); DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2 (sigmoid, correction, groups).
    """
    sigmoid = weights.startswith("sigmoid")
    scores = logits
    if correction is not None or n_groups > 1:
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
        scores = scores if correction is None else scores + correction
    if n_groups > 1:
        grouped = scores.reshape(*scores.shape[:-1], n_groups, -1)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(axis=-1)
        kept = jnp.any(jax.lax.top_k(best, top_groups)[1][..., None] == jnp.arange(n_groups), axis=-2)
        scores = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
    experts = jax.lax.top_k(scores, top_k)[1]
    chosen = jnp.take_along_axis(logits, experts, axis=-1)
    if weights == "unit":
        return experts, jnp.ones_like(chosen)
    if weights == "renormalised":
        return experts, jax.nn.softmax(chosen, axis=-1)
    if weights == "softmax":
        return experts, jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    counts = jax.nn.sigmoid(chosen)
    return experts, counts / counts.sum(axis=-1, keepdims=True) if weights == "sigmoid_renormalised" else counts


def balance_loss(
    logits: Float[Array, "*b e"], experts: Int[Array, "*b s"], mask: Bool[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """How unevenly positions are spread over the experts: top_k where each has as many, up to n_experts.

        E sum_e f_e P_e

    f_e is how often a position chose e, P_e the mean of its softmax over all; the gradient is that of P alone.

    Args:
      logits: of the router.
      experts: the chosen ones, whether or not there was room for them.
      mask: False where a position does not count.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4-6; with top_k > 1 as `load_balancing_loss_func` in Mixtral's
      modeling file of transformers counts.
    """
    n_experts = logits.shape[-1]
    frequency = _frequency(experts, n_experts, mask, logits.dtype)
    return n_experts * jnp.sum(frequency * _mean(jax.nn.softmax(logits, axis=-1), mask))


def correction_loss(
    correction: Float[Array, "e"], experts: Int[Array, "*b s"], mask: Bool[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """Nothing, 0, whose gradient for each expert's bias is how much more often than its share a position chose it.

    So whatever trains the model moves these biases along. Adam moves each by about its learning rate a step, whatever
    the excess, which is the source's rule, b -= u sign(excess), with u the learning rate (0.001 there).

    Args:
      correction: the biases.
      experts: the chosen experts, whether or not there was room for them.
      mask: False where a position does not count.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    frequency = _frequency(experts, len(correction), mask, correction.dtype)
    return jnp.sum((frequency - jnp.mean(frequency)) * (correction - jax.lax.stop_gradient(correction)))


def _frequency(experts, n_experts, mask, dtype):
    """How often a position chose each expert, on average: (e)."""
    counts = jnp.sum(experts[..., None] == jnp.arange(n_experts), axis=-2)  # *b e
    return _mean(counts.astype(dtype), mask)


def z_loss(logits: Float[Array, "*b e"], mask: Bool[Array, "*b"] | None = None) -> Float[Array, ""]:
    """The mean squared logsumexp of the router's logits.

    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return _mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))[..., None], mask)[0]


def _mean(x, mask):
    """The mean over positions, (e), of those that are there."""
    x = x.reshape(-1, x.shape[-1])
    if mask is None:
        return x.mean(axis=0)
    there = mask.reshape(-1, 1)
    return jnp.sum(jnp.where(there, x, 0), axis=0) / jnp.maximum(jnp.sum(there), 1)


class Layout(NamedTuple):
    """Room for the choices of every expert, in blocks of rows."""

    row: Int[Array, "b l s"]
    """The row of each choice, past the last one where it has none."""
    group: Int[Array, "c"] | None
    """The expert of each block. None: block e is of expert e."""
    n_blocks: int
    size: int
    """Rows of a block."""


def _queue(experts, n_experts):
    """(each entry's place in the queue of its expert, in order; the queues' lengths). Entries n_experts join none."""
    order = jnp.argsort(experts, stable=True)
    lengths = jnp.zeros(n_experts, jnp.int32).at[experts].add(1, mode="drop")
    starts = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    queued = experts[order]
    places = jnp.arange(len(experts), dtype=jnp.int32) - starts.at[queued].get(mode="clip")
    return jnp.zeros(len(experts), jnp.int32).at[order].set(places), lengths


def lay_out(experts: Int[Array, "b l s"], n_experts: int) -> Layout:
    """Room for every choice: the choices of each expert in blocks of its own, one expert after the other.

    Args:
      experts: the choices; n_experts stands for none.
      n_experts: how many there are.
    """
    # A block is half of an expert's even share, so that rows that fill up blocks cost at most half as much again.
    size = min(128, max(1, experts.size // (2 * n_experts)))
    used = min(n_experts, experts.size)
    n_blocks = (experts.size + used * (size - 1)) // size
    places, lengths = _queue(experts.reshape(-1), n_experts)
    ends = jnp.cumsum(-(-lengths // size))  # in blocks
    starts = jnp.append(0, ends)[:-1] * size
    row = starts.at[experts].get(mode="clip") + places.reshape(experts.shape)
    group = jnp.minimum(jnp.searchsorted(ends, jnp.arange(n_blocks), side="right"), n_experts - 1)
    return Layout(jnp.where(experts < n_experts, row, n_blocks * size), group, n_blocks, size)


def lay_out_within_capacity(experts: Int[Array, "b l s"], n_experts: int, capacity_factor: float) -> Layout:
    """As much room for each expert: the first C = ceil(capacity_factor l s / n_experts) of each row of the batch.

    Neither other rows nor later positions decide whether there is room for a position, though l, the length of the
    rows with their padding, does.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 3, for each row of the batch and top_k choices.
    """
    b, l, s = experts.shape
    capacity = min(l, math.ceil(capacity_factor * l * s / n_experts))
    places, _ = jax.vmap(lambda row: _queue(row, n_experts))(experts.reshape(b, l * s))
    places = places.reshape(experts.shape)
    row = (experts * b + jnp.arange(b)[:, None, None]) * capacity + places
    return Layout(jnp.where(places < capacity, row, n_experts * b * capacity), None, n_experts, b * capacity)


class ExpertLinear(nnx.Module):
    """A linear map for each expert, stacked: those of block c are of expert `group[c]`."""

    def __init__(
        self,
        n_experts: int,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        scale: float = 1.0,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        normal = jax.nn.initializers.normal(0.02 * scale)
        self.kernel = nnx.Param(normal(rngs.params(), (n_experts, d_in, d_out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((n_experts, d_out), param_dtype), decay=False) if bias else None

    def __call__(self, x: Float[Array, "c q i"], group: Int[Array, "c"] | None) -> Float[Array, "c q o"]:
        """Maps each block; see `grouped_matmul`."""
        dtype = jnp.result_type(x, self.kernel[...]) if self.dtype is None else self.dtype
        y = grouped_matmul(x.astype(dtype), self.kernel[...].astype(dtype), group)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(dtype)
        return y + (bias if group is None else bias[group])[:, None]


class Experts(nnx.Module):
    """The perceptrons of a mixture, stacked: `zoo.MLP` for each block of rows by its expert's weights.

    Their input has `width` channels; d_model says how wide their hidden layer is where the config leaves that open.
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        d_model: int,
        residual_scale: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.activation: str = config.activation
        d_ff = config.expert().width(d_model)
        options: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = ExpertLinear(config.n_experts, width, d_ff, **options) if config.gated else None
        self.up_proj = ExpertLinear(config.n_experts, width, d_ff, **options)
        options["bias"] = config.bias if config.out_bias is None else config.out_bias
        self.down_proj = ExpertLinear(config.n_experts, d_ff, width, scale=residual_scale, **options)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "c q d"], group: Int[Array, "c"] | None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "c q d"]:
        """Mixes the channels of each block's rows."""
        act, hidden = ACTIVATIONS[self.activation], self.up_proj(x, group)
        hidden = act(hidden) if self.gate_proj is None else act(self.gate_proj(x, group)) * hidden
        if rngs is not None:
            hidden = self.dropout(hidden, deterministic=False, rngs=rngs)
        return self.down_proj(hidden, group)


class MoE(nnx.Module):
    """Mixes channels, each position alone, by the few experts that a router chooses for it.

        y = sum over chosen e of weight_e expert_e(x), and the shared experts' sum

    With d_latent, those that are chosen work between two projections: expand(sum of weight_e expert_e(reduce(x))).

    The router computes in at least float32.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1; Fedus et al. 2021, arXiv:2101.03961; Jiang et al. 2024,
      arXiv:2401.04088. Shared experts: Dai et al. 2024, arXiv:2401.06066, eq. 9.
    """

    needs = ("mask",)
    has_auxiliary_loss = True

    def __init__(
        self,
        d_model: int,
        config: MoEConfig = MoEConfig(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        wide = jnp.promote_types(param_dtype, jnp.float32)
        self.router = linear(d_model, config.n_experts, dtype=wide, param_dtype=wide, rngs=rngs)
        width = config.d_latent or d_model
        self.correction = nnx.Param(jnp.zeros(config.n_experts, wide), decay=False) if config.correction else None
        self.reduce = linear(d_model, width, bias=config.bias, **options) if config.d_latent else None
        self.expand = linear(width, d_model, bias=config.bias, **options) if config.d_latent else None
        self.experts = Experts(width, config, d_model=d_model, residual_scale=residual_scale, **options)
        shared = config.shared(d_model)
        self.shared = None if shared is None else MLP(d_model, shared, residual_scale=residual_scale, **options)
        self.shared_gate = linear(d_model, 1, **options) if config.shared_gate else None

    def __call__(
        self, x: Float[Array, "b l d"], *, mask: Bool[Array, "b l"] | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b l d"]:
        """Mixes the channels of every position. Arguments are those of `run`."""
        return self.run(x, mask=mask, rngs=rngs)[0]

    def run(
        self, x: Float[Array, "b l d"], *, mask: Bool[Array, "b l"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """Mixes the channels of every position, and says what training adds to its loss.

        Args:
          x: input.
          mask: False where a position is not there: no expert gets it, and it does not count in the losses.
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Returns:
          (y, the sum of `balance_loss`, `z_loss` and `correction_loss`, each times its weight).
        """
        config = self.config
        n_experts = config.n_experts
        logits = self._logits(x)
        groups = {"n_groups": config.n_groups, "top_groups": config.top_groups}
        correction = None if self.correction is None else self.correction[...]
        experts, weights = choose(logits, config.top_k, config.weights, correction=correction, **groups)  # b l s
        weights = weights if config.weights_scale == 1 else weights * config.weights_scale
        loss = config.balance_weight * balance_loss(logits, experts, mask) + config.z_weight * z_loss(logits, mask)
        if correction is not None:
            loss = loss + config.correction_weight * correction_loss(correction, experts, mask)
        if mask is not None:
            experts = jnp.where(mask[..., None], experts, n_experts)
        if config.capacity_factor is None:
            row, group, n_blocks, size = lay_out(experts, n_experts)
        else:
            row, group, n_blocks, size = lay_out_within_capacity(experts, n_experts, config.capacity_factor)

        narrow = x if self.reduce is None else self.reduce(x)
        tokens = narrow.reshape(-1, narrow.shape[-1])
        token = jnp.broadcast_to(jnp.arange(len(tokens)).reshape(*x.shape[:2], 1), row.shape)
        source = jnp.full(n_blocks * size, len(tokens)).at[row].set(token, mode="drop")
        blocks = tokens.at[source].get(mode="fill", fill_value=0).reshape(n_blocks, size, -1)
        out = self.experts(blocks, group, rngs=rngs)
        chosen = out.reshape(n_blocks * size, -1).at[row].get(mode="fill", fill_value=0)  # b l s d
        y = jnp.einsum("bls,blsd->bld", weights, chosen.astype(weights.dtype)).astype(out.dtype)
        y = y if self.expand is None else self.expand(y)
        if self.shared is not None:
            shared = self.shared(x, rngs=rngs)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
        return y, loss

    def _logits(self, x):
        kernel = self.router.kernel[...]
        return jnp.matmul(x.astype(jnp.promote_types(x.dtype, kernel.dtype)), kernel, precision="highest")

    @classmethod
    def from_dense(
        cls, mlp: MLP, n_experts: int, top_k: int, *, order: Int[Array, "f"] | None = None, **options
    ) -> "MoE":
        """Cuts the hidden layer of a dense perceptron into experts.

        An expert is d_ff / n_experts of the hidden units, and a chosen one counts 1 (weights="unit"): with top_k =
        n_experts the mixture is the perceptron, with fewer it leaves out units that the router takes to be idle. Its
        vector for an expert is the mean of the weights into the expert's units (those of the gate, where there is one).

        Args:
          mlp: the perceptron, which stays as it is.
          n_experts: must divide its hidden width.
          top_k: experts a position.
          order: the hidden units in the order in which they are dealt out, e.g. sorted by cluster. None: as they are.
          **options: other fields of the mixture's `MoEConfig`, such as balance_weight.

        Raises:
          ValueError: n_experts does not divide the hidden width, or an option that the config rejects.

        Source: Qiu et al. 2023, arXiv:2310.10908 (EMoE: equal experts, "avg-k" gating).
        """
        if mlp.d_ff % n_experts:
            raise ValueError(f"n_experts={n_experts} must divide d_ff={mlp.d_ff}")
        up, gate, down = mlp.up_proj, mlp.gate_proj, mlp.down_proj
        described = {
            "n_experts": n_experts,
            "top_k": top_k,
            "d_ff": mlp.d_ff // n_experts,
            "gated": gate is not None,
            "activation": mlp.activation,
            "bias": up.bias is not None,
            "out_bias": down.bias is not None,
            "dropout": mlp.dropout.rate,
            "weights": "unit",
        }
        config = MoEConfig(**(described | options))
        mixture = cls(up.in_features, config, dtype=up.dtype, param_dtype=up.param_dtype, rngs=nnx.Rngs(0))

        def cut(columns):  # (..., f) -> (e, ..., f / e)
            columns = columns if order is None else columns[..., order]
            return jnp.moveaxis(columns.reshape(*columns.shape[:-1], n_experts, -1), -2, 0)

        pairs: list[tuple[Any, Any]] = [(up, mixture.experts.up_proj)]
        if gate is not None:
            pairs.append((gate, mixture.experts.gate_proj))
        for dense, stacked in pairs:
            stacked.kernel[...] = cut(dense.kernel[...])
            if stacked.bias is not None:
                stacked.bias[...] = cut(dense.bias[...])
        back: Any = mixture.experts.down_proj
        back.kernel[...] = jnp.swapaxes(cut(down.kernel[...].T), 1, 2)
        if down.bias is not None:  # top_k of them add up to the whole
            back.bias[...] = jnp.broadcast_to(down.bias[...] / top_k, back.bias.shape)
        keys = cut((up if gate is None else gate).kernel[...]).mean(axis=-1)  # e d
        mixture.router.kernel[...] = keys.T.astype(mixture.router.kernel.dtype)
        return mixture
