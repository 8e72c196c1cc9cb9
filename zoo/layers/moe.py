"""Mixture of experts: a channel mixer whose every position goes through a few of many perceptrons.

A router gives each position `top_k` of `n_experts` (`routing.py`). The positions of an expert are laid out in blocks of
rows next to each other (`expert_rows.py`), so that work grows with top_k and not with n_experts; `grouped_matmul.py`
multiplies them.

Axis letters: `e` experts · `s` the experts chosen at a position · `c` blocks of `q` rows.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from m2.linear import PRODUCT
from m2.mlp import ACTIVATIONS
from ssm.absent import blank, is_known
from ssm.sequence_cut import cut_of, each_piece
from zoo.layers.cut_experts import shared_out
from zoo.layers.expert_rows import from_rows, lay_out, lay_out_within_capacity, to_rows
from zoo.layers.grouped_matmul import grouped_matmul
from zoo.layers.linear import linear
from zoo.layers.mlp import MLP, MLPConfig
from zoo.layers.names import unknown_name
from zoo.layers.routing import Weights, balance_loss, choose, correction_loss, z_loss


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Options of the mixture of experts. The defaults are Mixtral's: 8 SwiGLUs, 2 a position, none dropped.

    Examples:
      >>> zoo.MoEConfig(n_experts=4, top_k=1).n_experts
      4
    """

    n_experts: int = 8
    """Experts that the router chooses from."""
    top_k: int = 2
    """Experts that a position goes through."""
    d_ff: int | None = None
    """Hidden width of each expert. None: as that of "mlp", 8/3 d_model when gated, 4 d_model otherwise."""
    gated: bool = True
    """Whether the hidden layer is a product of two projections (GLU)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"] = "silu"
    """Non-linearity of the hidden layer, or of its gate."""
    bias: bool = False
    """Whether the experts' projections have biases. The router has none."""
    out_bias: bool | None = None
    """Whether the output projection has one. None: as `bias` says."""
    n_tasks: int = 1
    """Tasks with a router each, by which a row goes to the experts that all share (M3ViT): `task=` says which."""
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
        if self.n_tasks < 1:
            raise ValueError(f"n_tasks={self.n_tasks}, expected at least 1")
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

    @property
    def needs(self) -> tuple[str, ...]:
        """What the mixture is called with besides, see `zoo.layers.needs`."""
        return ("mask",) if self.n_tasks == 1 else ("mask", "task")

    def expert(self) -> MLPConfig:
        """One expert as a dense perceptron."""
        names = ("d_ff", "gated", "activation", "bias", "out_bias", "dropout")
        return MLPConfig(**{name: getattr(self, name) for name in names})

    def shared(self, d_model: int) -> MLPConfig | None:
        """The shared experts as one dense perceptron, since the sum of n is one of n times the width, or None."""
        expert = self.expert()
        width = self.n_shared * (self.d_ff_shared or expert.width(d_model))
        return dataclasses.replace(expert, d_ff=width) if width else None


class ExpertLinear(nnx.Module):
    """A linear map for each expert, stacked: those of block c are of expert `group[c]`."""

    def __init__(
        self,
        n_experts: int,
        d_in: int,
        d_out: int,
        *,
        axes: tuple,
        bias: bool = False,
        scale: float = 1.0,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        normal = jax.nn.initializers.normal(0.02 * scale)
        self.kernel = nnx.Param(normal(rngs.params(), (n_experts, d_in, d_out), param_dtype), axes=("experts", *axes))
        zeros = jnp.zeros((n_experts, d_out), param_dtype) if bias else None
        self.bias = None if zeros is None else nnx.Param(zeros, decay=False, axes=("experts", axes[1]))

    def __call__(self, x: Float[Array, "c q i"], group: Int[Array, "c"] | None) -> Float[Array, "c q o"]:
        """Maps each block; see `grouped_matmul`."""
        dtype = jnp.result_type(x, self.kernel[...]) if self.dtype is None else self.dtype
        y = checkpoint_name(grouped_matmul(x.astype(dtype), self.kernel[...].astype(dtype), group), PRODUCT)
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
        self.gate_proj = (
            ExpertLinear(config.n_experts, width, d_ff, axes=("embed", "inner"), **options) if config.gated else None
        )
        self.up_proj = ExpertLinear(config.n_experts, width, d_ff, axes=("embed", "inner"), **options)
        options["bias"] = config.bias if config.out_bias is None else config.out_bias
        self.down_proj = ExpertLinear(
            config.n_experts, d_ff, width, axes=("inner", "embed"), scale=residual_scale, **options
        )
        self.dropout = nnx.Dropout(config.dropout)

    @property
    def n_experts(self) -> int:
        """How many there are; on a device of several, how many it has."""
        return self.up_proj.kernel.shape[0]

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

    Examples:
      >>> layer = zoo.MoE(8, zoo.MoEConfig(n_experts=4, top_k=2, d_ff=8), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1; Fedus et al. 2021, arXiv:2101.03961; Jiang et al. 2024,
      arXiv:2401.04088. Shared experts: Dai et al. 2024, arXiv:2401.06066, eq. 9. A router for each task: Liang et al.
      2022, arXiv:2210.14793 (M3ViT), section 3.2.
    """

    needs = ("mask",)
    has_auxiliary_loss = True
    runs_cut = True

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
        self.router = linear(d_model, config.n_tasks * config.n_experts, dtype=wide, param_dtype=wide, rngs=rngs)
        width = config.d_latent or d_model
        correction = jnp.zeros(config.n_experts, wide) if config.correction else None
        self.correction = None if correction is None else nnx.Param(correction, decay=False, axes=(None,))
        self.reduce = linear(d_model, width, bias=config.bias, **options) if config.d_latent else None
        self.expand = (
            linear(width, d_model, axes=(None, "embed"), bias=config.bias, **options) if config.d_latent else None
        )
        self.experts = Experts(width, config, d_model=d_model, residual_scale=residual_scale, **options)
        shared = config.shared(d_model)
        self.shared = None if shared is None else MLP(d_model, shared, residual_scale=residual_scale, **options)
        self.shared_gate = linear(d_model, 1, **options) if config.shared_gate else None

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        task: Int[Array, "b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes the channels of every position. Arguments are those of `run`."""
        return self.run(x, mask=mask, task=task, rngs=rngs)[0]

    def run(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        task: Int[Array, "b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """Mixes the channels of every position, and says what training adds to its loss.

        Args:
          x: input.
          mask: False where a position is not there: no expert gets it, whatever lies there, and no loss counts it.
          task: the number of each row's task, 0 to n_tasks - 1, whose router it goes by. None where there is one.
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Raises:
          ValueError: no task where there are several, one where there are not, or another number, where it is known.

        Returns:
          (y, the sum of `balance_loss`, `z_loss` and `correction_loss`, each times its weight).
        """
        config = self.config
        self._check_task(x, task)
        if 0 in x.shape:
            last = self.experts.down_proj
            return x.astype(last.dtype or jnp.result_type(x, last.kernel[...])), jnp.zeros((), self.router.kernel.dtype)
        n_experts, x = config.n_experts, blank(mask, x)
        logits = self._logits(x, task)
        correction = None if self.correction is None else self.correction[...]
        experts, weights = self._choose(logits, correction)  # b l s
        weights = weights if config.weights_scale == 1 else weights * config.weights_scale
        loss = config.balance_weight * balance_loss(logits, experts, mask) + config.z_weight * z_loss(logits, mask)
        if correction is not None:
            loss = loss + config.correction_weight * correction_loss(correction, experts, mask)
        if mask is not None:
            experts = jnp.where(mask[..., None], experts, n_experts)
        if config.capacity_factor is not None and cut_of(x) is not None:
            raise NotImplementedError(
                f"capacity_factor={config.capacity_factor} counts the positions of whole rows, expected None, or "
                "rows that are not cut over devices (--mesh.sequence 1)"
            )
        key = None if rngs is None else rngs.dropout()
        reduced = x if self.reduce is None else self.reduce(x)
        y = shared_out(self._mix, self.experts, reduced, experts, weights, key, n_experts=n_experts)
        y = y if self.expand is None else self.expand(y)
        if self.shared is not None:
            shared = self.shared(x, rngs=rngs)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
        return y, loss

    def _choose(self, logits, correction):
        config = self.config

        def choose_here(logits, correction):
            groups = {"n_groups": config.n_groups, "top_groups": config.top_groups}
            return choose(logits, config.top_k, config.weights, correction=correction, **groups)

        cut = cut_of(logits)
        return choose_here(logits, correction) if cut is None else each_piece(choose_here, cut, logits, correction)

    def _mix(self, mixers, x, experts, weights, key):
        """What some of the experts, those numbered from 0, make of the positions that chose them."""
        n, factor, total = mixers.n_experts, self.config.capacity_factor, self.config.n_experts
        layout = lay_out(experts, n) if factor is None else lay_out_within_capacity(experts, n, factor, of=total)
        out = mixers(to_rows(x, layout), layout.group, rngs=None if key is None else nnx.Rngs(dropout=key))
        chosen = from_rows(out, layout)
        return jnp.einsum("bls,blsd->bld", weights, chosen.astype(weights.dtype), precision="highest").astype(out.dtype)

    def _check_task(self, x, task):
        n = self.config.n_tasks
        if (task is None) != (n == 1):
            expected = "none" if n == 1 else f"that of each row, 0 to {n - 1}"
            raise ValueError(
                f"task is {'not given' if task is None else 'given'} with n_tasks={n}, expected {expected}"
            )
        if task is None:
            return
        if task.shape != x.shape[:1]:
            raise ValueError(f"task has shape {task.shape}, expected a number for each row, {x.shape[:1]}")
        if is_known(task) and not np.all((np.asarray(task) >= 0) & (np.asarray(task) < n)):
            raise ValueError(f"task={np.asarray(task)}, expected 0 to {n - 1}")

    def _logits(self, x, task=None):
        kernel = self.router.kernel[...]
        if task is not None:
            kernel = kernel.reshape(kernel.shape[0], self.config.n_tasks, self.config.n_experts)
            of_rows = jnp.take(kernel, task, axis=1, mode="fill", fill_value=jnp.nan)
            wide = x.astype(jnp.promote_types(x.dtype, kernel.dtype))
            return jnp.einsum("bld,dbe->ble", wide, of_rows, precision="highest")
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
          ValueError: n_experts does not divide the hidden width, a series of activations, or an option that the config
            rejects.

        Source: Qiu et al. 2023, arXiv:2310.10908 (EMoE: equal experts, "avg-k" gating).
        """
        if mlp.d_ff % n_experts:
            raise ValueError(f"n_experts={n_experts} must divide d_ff={mlp.d_ff}")
        if mlp.terms is not None:
            raise ValueError("mlp has a series of activations (series > 1), which experts have not")
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
        mixture.router.kernel[...] = jnp.tile(keys.T, (1, config.n_tasks)).astype(mixture.router.kernel.dtype)
        return mixture
