"""Which widths of a model the axes of its parameters are: what is written anew when a width grows or shrinks.

An axis is one width or several side by side; a width is counted in units, channels or heads, of a few numbers each.
Axes that are summed over are marked: where a unit is there twice, what reads it halves.

    in_proj of Mamba-2     d_model (read) x [heads of z, heads of x, B, C, one number a head]

Blocks of a block-diagonal map cut a width in runs of neighbours, and heads share what neighbours share: keys, B and C,
filters. So a unit's copies lie beside it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from m2 import BlockdiagLinear, M2Mixer, MonarchMLP
from ssm import LinearAttention, Mamba, Mamba2, Mamba3
from zoo.layers.attention import Attention
from zoo.layers.bottleneck import Bottleneck
from zoo.layers.depth_router import DepthRouter
from zoo.layers.mlp import MLP
from zoo.layers.moe import MoE
from zoo.models.build import Model
from zoo.models.causal import CausalLM
from zoo.models.encoder_heads import MaskedLM

RESIDUAL = "d_model"
"""The width between the blocks, the same everywhere."""


class Span(NamedTuple):
    """A width in an axis."""

    width: str | None
    """Its name. None: one that stays as it is."""
    units: int
    each: int = 1
    """Numbers of a unit, side by side."""
    rows: int | None = None
    """Numbers of one block, where the axis is that of each of several; None: it holds the whole width."""


class Axis(NamedTuple):
    """An axis of a parameter."""

    spans: tuple[Span, ...]
    read: bool = False
    """Whether the map sums over it."""

    @property
    def size(self) -> int:
        """Its length."""
        return sum(span.units * span.each if span.rows is None else span.rows for span in self.spans)


Axes = tuple[Axis, ...]
Path = tuple[Any, ...]
Kept = dict[str, np.ndarray]
"""The units that stay of each width that shrinks."""


def widths(model: Model) -> dict[Path, Axes]:
    """The axes of every parameter of a model, by its path.

    Raises:
      ValueError: a model with parts whose widths are not known here: names the parameter.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    known: dict[Path, Axes] = {}
    for path, module in nnx.iter_modules(model):
        for kind, describe in _KINDS.items():
            if type(module) is kind:
                name = ".".join(map(str, path))
                found = describe(module, functools.partial("{}.{}".format, name))
                known |= {(*path, *_parts(inner)): axes for inner, axes in found.items()}
    d = model.config.d_model
    for path, param in params.items():
        around = None if path in known else _around(path, param.shape, d, model)
        if around is not None:
            known[path] = around
    for path, param in params.items():
        name = ".".join(map(str, path))
        if path not in known or any(axis.size != n for axis, n in zip(known[path], param.shape, strict=True)):
            raise ValueError(f"{name} belongs to a kind of module whose widths cannot be changed")
    return {path: known[path] for path in params}


def sizes(axes: dict[Path, Axes]) -> dict[str, int]:
    """Units of every width."""
    return {span.width: span.units for all_ in axes.values() for axis in all_ for span in axis.spans if span.width}


def places_on(axis: Axis, kept: Kept, n_blocks: int) -> np.ndarray:
    """Where on an axis what stays lies; of one that is cut into blocks a row for each: (blocks, places)."""
    (first, *_), found, start = axis.spans, [], 0
    if first.rows is not None:
        # The blocks together have a place for each unit, or two: a gate and what it opens.
        units = kept.get(first.width or "", np.arange(first.units))
        flat = np.concatenate([units + first.units * j for j in range(n_blocks * first.rows // first.units)])
        return np.reshape(flat % first.rows, (n_blocks, -1))
    for span in axis.spans:
        units = kept.get(span.width or "", np.arange(span.units))
        found.append(start + (units[:, None] * span.each + np.arange(span.each)).ravel())
        start += span.units * span.each
    return np.concatenate(found)


def _parts(name: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _fixed(n: int) -> Axis:
    return Axis((Span(None, n),))


def _wrote(*spans: Span) -> Axis:
    return Axis(spans)


def _reads(*spans: Span) -> Axis:
    return Axis(spans, read=True)


def _around(path: Path, shape: tuple[int, ...], d: int, model: Model) -> Axes | None:
    """The parameters around the mixers: embeddings, norms, heads."""
    residual, last, owner = Span(RESIDUAL, d), path[-1], path[-2] if len(path) > 1 else None
    if last == "embedding" and len(shape) == 2:
        return _fixed(shape[0]), _wrote(residual)
    if owner in ("lm_head", "classifier", "decoder"):
        return (_reads(residual), _fixed(shape[1])) if last == "kernel" else (_fixed(shape[0]),)
    if owner in ("dense", "pooler"):
        return (_reads(residual), _wrote(residual)) if last == "kernel" else (_wrote(residual),)
    if path == ("bias",):  # a masked language model's, of the vocabulary
        return (_fixed(shape[0]),)
    if shape == (d,) and (last in ("scale", "scale2") or (last == "bias" and str(owner).startswith("norm"))):
        # The norm before a head that is the embedding: each channel is there as often in both.
        return (Axis((residual,), read=path[:-1] == _norm_before_tied_head(model)),)
    return None


def _norm_before_tied_head(model: Model) -> Path | None:
    if isinstance(model, MaskedLM):
        return ("norm",)
    return ("backbone", "norm_f") if isinstance(model, CausalLM) and model.lm_head is None else None


Named = Callable[[str], str]


def _linear(name: str, module: nnx.Linear | None, d_in: Axis, d_out: Axis) -> dict[str, Axes]:
    if module is None:
        return {}
    axes: dict[str, Axes] = {f"{name}.kernel": (d_in._replace(read=True), d_out)}
    return axes if module.bias is None else axes | {f"{name}.bias": (d_out,)}


def _conv(name: str, module: Any, channels: Axis) -> dict[str, Axes]:
    if module is None:
        return {}
    axes: dict[str, Axes] = {f"{name}.kernel": (channels, *map(_fixed, module.kernel.shape[1:]))}
    return axes if module.bias is None else axes | {f"{name}.bias": (channels,)}


def _residual(module: nnx.Linear, axis: int) -> Axis:
    return _wrote(Span(RESIDUAL, module.kernel.shape[axis]))


def _attention(m: Attention, named: Named) -> dict[str, Axes]:
    d = _residual(m.q_proj, 0)
    q, kv = Span(named("n_heads"), m.n_heads, m.head_dim), Span(named("n_kv_heads"), m.n_kv_heads, m.head_dim)
    axes = _linear("q_proj", m.q_proj, d, _wrote(q)) | _linear("o_proj", m.o_proj, _wrote(q), d)
    axes |= _linear("k_proj", m.k_proj, d, _wrote(kv)) | _linear("v_proj", m.v_proj, d, _wrote(kv))
    if m.rope_index is not None:
        axes["rope_index"] = _wrote(Span(named("n_kv_heads"), m.n_kv_heads)), _fixed(m.rope_index.shape[1])
    norms = {"q_norm": m.q_norm, "k_norm": m.k_norm}
    axes |= {f"{name}.scale": (_fixed(m.head_dim),) for name, norm in norms.items() if norm is not None}
    return axes | _conv("conv1d", m.conv1d, _wrote(q, kv, kv))


def _linear_attention(m: LinearAttention, named: Named) -> dict[str, Axes]:
    d = _residual(m.q_proj, 0)
    q, kv = Span(named("n_heads"), m.n_heads, m.head_dim), Span(named("n_kv_heads"), m.n_kv_heads, m.head_dim)
    one = _wrote(Span(named("n_heads"), m.n_heads))
    axes = _linear("q_proj", m.q_proj, d, _wrote(q)) | _linear("o_proj", m.o_proj, _wrote(q), d)
    axes |= _linear("k_proj", m.k_proj, d, _wrote(kv)) | _linear("v_proj", m.v_proj, d, _wrote(kv))
    axes |= _linear("gate_proj", m.gate_proj, d, _wrote(q)) | _linear("dt_proj", m.dt_proj, d, one)
    axes |= _conv("conv1d", m.conv1d, _wrote(kv, kv, q)) | {"A_log": (one,), "dt_bias": (one,)}
    return axes if m.norm is None else axes | {"norm.scale": (_fixed(m.head_dim),)}


def _mamba(m: Mamba, named: Named) -> dict[str, Axes]:
    d, inner = _residual(m.in_proj, 0), Span(named("d_inner"), *m.A_log.shape[:1])
    few = {name: _fixed(getattr(m, name).kernel.shape[axis]) for name, axis in (("x_proj", 1), ("dt_proj", 0))}
    axes = _linear("in_proj", m.in_proj, d, _wrote(inner, inner)) | _linear("out_proj", m.out_proj, _wrote(inner), d)
    axes |= _linear("x_proj", m.x_proj, _wrote(inner), few["x_proj"])
    axes |= _linear("dt_proj", m.dt_proj, few["dt_proj"], _wrote(inner))
    axes["dt_proj.kernel"] = (few["dt_proj"], _wrote(inner))
    axes |= _conv("conv1d", m.conv1d, _wrote(inner))
    axes |= {"A_log": (_wrote(inner), _fixed(m.A_log.shape[1])), "D": (_wrote(inner),)}
    norms = {"dt_norm": m.dt_norm, "B_norm": m.B_norm, "C_norm": m.C_norm}
    return axes | {f"{name}.scale": (_fixed(*norm.scale.shape),) for name, norm in norms.items() if norm is not None}


def _mamba2(m: Mamba2, named: Named) -> dict[str, Axes]:
    d, p = _residual(m.in_proj, 0), m.config.head_dim
    heads, one = Span(named("n_heads"), m.n_heads, p), Span(named("n_heads"), m.n_heads)
    bc, beside = Span(None, 2 * m.config.n_groups * m.config.d_state), Span(named("d_mlp"), m.d_inner - m.d_ssm)
    entry = (beside, beside) if beside.units else ()
    axes = _linear("in_proj", m.in_proj, d, _wrote(*entry, heads, heads, bc, one))
    axes |= _linear("out_proj", m.out_proj, _wrote(*entry[:1], heads), d) | _conv("conv1d", m.conv1d, _wrote(heads, bc))
    axes |= {"A_log": (_wrote(one),), "dt_bias": (_wrote(one),)}
    axes["D"] = (_wrote(heads if m.config.D_has_hdim else one),)
    return axes if m.norm is None else axes | {"norm.scale": (_wrote(heads),)}


def _mamba3(m: Mamba3, named: Named) -> dict[str, Axes]:
    d, p, c = _residual(m.in_proj, 0), m.config.head_dim, m.config
    heads, one = Span(named("n_heads"), m.n_heads, p), Span(named("n_heads"), m.n_heads)
    bc = Span(None, 2 * c.rank * c.n_groups * c.d_state)
    axes = _linear("in_proj", m.in_proj, d, _wrote(heads, heads, bc, one, one, one, Span(None, c.n_angles)))
    axes |= _linear("out_proj", m.out_proj, _wrote(heads), d)
    axes |= {name: (_wrote(one),) for name in ("D", "dt_bias")}
    axes |= {f"{name}_norm.scale": (_fixed(c.d_state),) for name in "BC"}
    for name in ("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"):
        if (value := getattr(m, name, None)) is not None:
            axes[name] = (_wrote(one), *map(_fixed, value.shape[1:]))
    return axes | ({} if getattr(m, "norm", None) is None else {"norm.scale": (_wrote(heads),)})


def _m2(m: M2Mixer, named: Named) -> dict[str, Axes]:
    d = _residual(m.in_linear, 0)
    inner = Span(named("d_inner"), m.out_linear.kernel.shape[0])
    axes = _linear("in_linear", m.in_linear, d, _wrote(inner, inner, inner))
    axes |= _linear("out_linear", m.out_linear, _wrote(inner), d)
    axes |= _conv("short_filter", m.short_filter, _wrote(inner, inner, inner))
    # Neighbouring channels share a filter: there are no more of them than there were.
    for name in ("filter_fn", "filter_fn2"):
        if (filters := getattr(m, name, None)) is not None:
            for path, param in nnx.to_flat_state(nnx.state(filters, nnx.Param)):
                axes[".".join(map(str, (name, *path)))] = tuple(map(_fixed, param.shape))
    return axes


def _mlp(m: MLP, named: Named) -> dict[str, Axes]:
    d, hidden = _residual(m.up_proj, 0), _wrote(Span(named("d_ff"), m.up_proj.kernel.shape[1]))
    axes = _linear("up_proj", m.up_proj, d, hidden) | _linear("down_proj", m.down_proj, hidden, d)
    if m.terms is not None:
        axes |= {f"terms.{name}": (_fixed(m.terms.scale.shape[0]), hidden) for name in ("scale", "shift")}
    return axes | _linear("gate_proj", m.gate_proj, d, hidden)


def _bottleneck(m: Bottleneck, named: Named) -> dict[str, Axes]:
    d, few = _residual(m.down_proj, 0), _fixed(m.down_proj.kernel.shape[1])
    return _linear("down_proj", m.down_proj, d, few) | _linear("up_proj", m.up_proj, few, d)


def _depth_router(m: DepthRouter, named: Named) -> dict[str, Axes]:
    d, few = _residual(m.score, 0), _fixed(m.config.predictor_width)
    axes = _linear("score", m.score, d, _fixed(1)) | _linear("hidden", m.hidden, d, few)
    return axes | _linear("decision", m.decision, few, _fixed(1))


def _monarch_mlp(m: MonarchMLP, named: Named) -> dict[str, Axes]:
    if not isinstance(m.gated_layers, BlockdiagLinear) or not isinstance(m.wo, BlockdiagLinear):
        return {}
    (k, o, i), (_, back, hidden) = m.gated_layers.kernel.shape, m.wo.kernel.shape
    if (
        (k * i, k * back) != (m.gated_layers.d_in, m.wo.d_out)
        or k * hidden != m.wo.d_in
        or k * o != m.gated_layers.d_out
    ):
        return {}  # blocks that stick out over a width
    d, d_ff = Span(RESIDUAL, k * i), Span(named("d_ff"), k * hidden)
    axes: dict[str, Axes] = {
        "gated_layers.kernel": (_fixed(k), _wrote(d_ff._replace(rows=o)), _reads(d._replace(rows=i))),
        "wo.kernel": (_fixed(k), _wrote(d._replace(rows=back)), _reads(d_ff._replace(rows=hidden))),
    }
    return axes if m.wo.bias is None else axes | {"wo.bias": (_wrote(d),)}


def _moe(m: MoE, named: Named) -> dict[str, Axes]:
    d, experts = _residual(m.router, 0), m.config.n_experts
    axes = _linear("router", m.router, d, _fixed(experts)) | _linear("shared_gate", m.shared_gate, d, _fixed(1))
    if m.correction is not None:
        axes["correction"] = (_fixed(experts),)
    inside = d
    if m.config.d_latent is not None:
        inside = _fixed(m.config.d_latent)
        axes |= _linear("reduce", m.reduce, d, inside) | _linear("expand", m.expand, inside, d)
    hidden = _wrote(Span(named("d_ff"), m.experts.up_proj.kernel.shape[-1]))
    for name, (d_in, d_out) in {
        "gate_proj": (inside, hidden),
        "up_proj": (inside, hidden),
        "down_proj": (hidden, inside),
    }.items():
        if (linear := getattr(m.experts, name)) is not None:
            axes[f"experts.{name}.kernel"] = (_fixed(experts), d_in._replace(read=True), d_out)
            if linear.bias is not None:
                axes[f"experts.{name}.bias"] = (_fixed(experts), d_out)
    return axes


_KINDS: dict[type, Callable[[Any, Named], dict[str, Axes]]] = {
    Attention: _attention,
    LinearAttention: _linear_attention,
    Mamba: _mamba,
    Mamba2: _mamba2,
    Mamba3: _mamba3,
    M2Mixer: _m2,
    MLP: _mlp,
    MonarchMLP: _monarch_mlp,
    MoE: _moe,
    Bottleneck: _bottleneck,
    DepthRouter: _depth_router,
}
