"""Contenders of `bench conv`, `mlp` and `bert`: the parts of Monarch Mixer, then whole M2-BERT, and what they replace.

conv   causal, a filter as long as the sequence for each channel. The naive way is what one writes first,
       irfft(rfft(u) rfft(k)) of twice the length. JAX's contenders take b l d, as between the layers of a model;
       PyTorch's b d l, where its FFT is fastest, and so without transpositions.
mlp    of hidden width 4 d_model: M2-BERT's with 4 blocks, with Monarch matrices of two factors, and dense ones.
bert   masked language models of equal widths in evaluation mode: M2-BERT's, with its filters as long as the
       sequence; attention without rotary embedding in blocks like BERT's; and BERT of transformers with PyTorch's
       scaled_dot_product_attention.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import m2
import zoo
from experiments.bench.contenders import Call, Contender, Pass, Sizes, jax_passes, require, torch_passes
from experiments.bench.models import make_cotangent, make_ids, passes_of_model, passes_of_torch_model


def make_conv_arrays(sizes: Sizes) -> dict[str, np.ndarray]:
    """Input b l d, filters d l whose output has the input's scale, and a cotangent b l d."""
    rng = np.random.default_rng(0)
    shape = (sizes.batch, sizes.length, sizes.d_model)
    filters = rng.standard_normal((sizes.d_model, sizes.length), dtype=np.float32)
    u, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return {"u": u, "k": filters / np.float32(sizes.length**0.5), "dy": dy}


def naive_conv(u, k):
    """The obvious causal convolution of u (b, l, d) with k (d, l)."""
    n = 2 * u.shape[1]
    spectrum = jnp.fft.rfft(u, n, axis=1) * jnp.fft.rfft(k.T, n, axis=0)
    return jnp.fft.irfft(spectrum, n, axis=1)[:, : u.shape[1]]


def _conv(convolve) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        u, k, dy = map(jnp.asarray, make_conv_arrays(sizes).values())
        return jax_passes(lambda inputs: convolve(*inputs), (u, k), dy)

    return build


def _torch_conv(sizes: Sizes) -> dict[Pass, Call]:
    require("torch")
    import torch

    u, k, dy = map(torch.tensor, make_conv_arrays(sizes).values())
    u, dy = (x.transpose(1, 2).contiguous() for x in (u, dy))
    l, n = sizes.length, 2 * sizes.length

    def run():
        return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(k, n), n)[..., :l]

    return torch_passes(run, (u.requires_grad_(), k.requires_grad_()), dy)


def _mlp(make) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        graphdef, params = nnx.split(make(sizes.d_model, 4 * sizes.d_model))
        x = jnp.asarray(make_cotangent(sizes, sizes.d_model))
        return jax_passes(lambda of: nnx.merge(graphdef, of[0])(of[1]), (params, x), jnp.ones_like(x))

    return build


def _monarch_mlp(order) -> Contender:
    def make(d_model, d_ff):
        return m2.MonarchMLP(d_model, m2.MonarchMLPConfig(d_ff=d_ff, order=order), rngs=nnx.Rngs(0))

    return _mlp(make)


def _dense_mlp(d_model, d_ff):
    return zoo.MLP(d_model, zoo.MLPConfig(d_ff=d_ff, activation="gelu"), rngs=nnx.Rngs(0))


def _torch_mlp(sizes: Sizes) -> dict[Pass, Call]:
    require("torch")
    import torch

    torch.manual_seed(0)
    d, f = sizes.d_model, 4 * sizes.d_model
    gate, up, down = (torch.nn.Linear(i, o, bias=False) for i, o in ((d, f), (d, f), (f, d)))
    x = torch.tensor(make_cotangent(sizes, d), requires_grad=True)
    run = lambda: down(torch.nn.functional.gelu(gate(x)) * up(x))  # noqa: E731
    return torch_passes(run, (gate.weight, up.weight, down.weight, x), torch.ones_like(x))


def m2_bert(sizes: Sizes) -> zoo.MaskedLMConfig:
    """M2-BERT-80m with the widths of the benchmark."""
    preset: Any = zoo.presets["m2-bert-80m"]
    return dataclasses.replace(
        preset,
        **_shape(sizes),
        m2=dataclasses.replace(preset.m2, l_max=sizes.length),
        monarch=dataclasses.replace(preset.monarch, d_ff=4 * sizes.d_model),
    )


def attention_bert(sizes: Sizes) -> zoo.MaskedLMConfig:
    """BERT-base with the widths of the benchmark."""
    return zoo.MaskedLMConfig(
        pattern="attn/mlp",
        **_shape(sizes),
        attn=zoo.AttentionConfig(position="none", bias=True),
        mlp=zoo.MLPConfig(d_ff=4 * sizes.d_model, gated=False, activation="gelu", bias=True),
    )


def _shape(sizes: Sizes) -> dict[str, Any]:
    shape = {"d_model": sizes.d_model, "n_layers": sizes.layers, "vocab_size": sizes.vocab_size}
    return {**shape, "max_len": sizes.length}


def _bert(config) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        model = zoo.MaskedLM(config(sizes), rngs=nnx.Rngs(0))
        return passes_of_model(model, lambda model, ids: model(ids), sizes)

    return build


def _transformers_bert(sizes: Sizes) -> dict[Pass, Call]:
    require("torch", "transformers")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": max(1, sizes.d_model // 64),
        "intermediate_size": 4 * sizes.d_model,
        "max_position_embeddings": sizes.length,
        "attn_implementation": "sdpa",
    }
    model: Any = transformers.BertForMaskedLM(transformers.BertConfig(**shape)).eval()
    ids = torch.tensor(make_ids(sizes)[:, : sizes.length]).long()
    run = lambda ids: model(ids).logits  # noqa: E731
    return passes_of_torch_model(model, run, ids, make_cotangent(sizes, sizes.vocab_size))


CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "conv": {
        "m2.fft_conv xla": _conv(lambda u, k: m2.fft_conv(u, k, implementation="xla")),
        "m2.fft_conv monarch": _conv(lambda u, k: m2.fft_conv(u, k, implementation="monarch")),
        "jax.numpy.fft": _conv(naive_conv),
        "torch.fft": _torch_conv,
    },
    "mlp": {
        "m2.MonarchMLP": _monarch_mlp(1),
        "m2.MonarchMLP, order 2": _monarch_mlp(2),
        "zoo.MLP, dense": _mlp(_dense_mlp),
        "torch, dense": _torch_mlp,
    },
    "bert": {
        "zoo.MaskedLM m2/monarch": _bert(m2_bert),
        "zoo.MaskedLM attn/mlp": _bert(attention_bert),
        "transformers BertForMaskedLM": _transformers_bert,
    },
}
