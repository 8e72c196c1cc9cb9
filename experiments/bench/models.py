"""Contenders of `bench mamba`, `mamba2` and `mamba3`: our models, and those of four other packages, of equal sizes.

Others run as their documentation has it; where there is a choice, the faster one is taken:
  mambapy        the backbone, without embedding, last norm and head; its parallel scan; `step` to decode.
  transformers   the path in torch operations, all there is without CUDA. Its default for Mamba-1 loops over positions;
                 back through that loop takes time quadratic in the length (139 s at 512 positions on two cores), so the
                 backward pass is timed with `use_mambapy=True` alone.
  mamba2-jax     at its default chunk of 256 positions, and at 64, which decodes faster. `forward` is jitted.
  mamba3-jax     at its default chunk of 64.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ssm
import zoo
from experiments.bench.contenders import Call, Contender, Pass, Sizes, jax_passes, require, torch_passes


def make_ids(sizes: Sizes) -> np.ndarray:
    """Tokens, b l: the same for every contender."""
    shape = (sizes.batch, max(sizes.length, sizes.tokens))
    return np.random.default_rng(0).integers(0, sizes.vocab_size, shape, dtype=np.int32)


def make_cotangent(sizes: Sizes, width: int) -> np.ndarray:
    """What the backward pass starts from, the gradient in the output: b l width."""
    return np.random.default_rng(1).standard_normal((sizes.batch, sizes.length, width), dtype=np.float32)


# Ours and other JAX packages.


def passes_of_model(model: nnx.Module, logits, sizes: Sizes) -> dict[Pass, Call]:
    """`logits(model, ids)` forward, and on to the gradient in every parameter."""
    graphdef, params = nnx.split(model)
    ids, dy = jnp.asarray(make_ids(sizes)[:, : sizes.length]), jnp.asarray(make_cotangent(sizes, sizes.vocab_size))

    def run(params, ids):
        return logits(nnx.merge(graphdef, params), ids)[..., : sizes.vocab_size]

    return jax_passes(run, params, dy, ids)


def _tokens(sizes: Sizes) -> tuple[jax.Array, list[jax.Array]]:
    """A prompt, and the tokens that follow it, one array each."""
    ids = make_ids(sizes)
    prompt = jnp.asarray(ids[:, : sizes.tokens])
    return prompt, [jnp.asarray(ids[:, t : t + 1]) for t in range(sizes.tokens)]


def our_model(sizes: Sizes, pattern: Literal["mamba", "mamba2", "mamba3"], **options: Any) -> zoo.CausalLM:
    """The model that the others are measured against: published defaults, and the sizes of the benchmark."""
    mixer: dict[str, Any] = {
        "mamba": ssm.MambaConfig(d_state=sizes.d_state),
        "mamba2": ssm.Mamba2Config(d_state=sizes.d_state),
        "mamba3": ssm.Mamba3Config(d_state=sizes.d_state, **options),
    }
    shape: dict[str, Any] = {"d_model": sizes.d_model, "n_layers": sizes.layers, "vocab_size": sizes.vocab_size}
    return zoo.CausalLM(zoo.CausalLMConfig(pattern=pattern, **shape, **{pattern: mixer[pattern]}), rngs=nnx.Rngs(0))


def _ours(pattern: Literal["mamba", "mamba2", "mamba3"], **options: Any) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        model = our_model(sizes, pattern, **options)
        graphdef, params = nnx.split(model)

        @functools.partial(jax.jit, donate_argnums=2)
        def extend(params, ids, state):
            return nnx.merge(graphdef, params).extend(ids, state, last_only=True)

        prompt, following = _tokens(sizes)
        state = None

        def decode():
            nonlocal state
            if state is None:
                _, state = extend(params, prompt, model.init_state(sizes.batch))
            for token in following:
                logits, state = extend(params, token, state)
            return jax.block_until_ready(logits)

        return {**passes_of_model(model, lambda model, ids: model(ids), sizes), "decode": decode}

    return build


def _their_jax(version: Literal[2, 3], **options: Any) -> Contender:
    """mamba2-jax and mamba3-jax, two packages of one author with one interface."""

    def build(sizes: Sizes) -> dict[Pass, Call]:
        require(f"mamba{version}-jax")
        peer = importlib.import_module(f"mamba{version}_jax.modeling")
        config = getattr(peer, f"Mamba{version}Config")(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.d_model,
            num_hidden_layers=sizes.layers,
            state_size=sizes.d_state,
            **options,
        )
        model = getattr(peer, f"Mamba{version}ForCausalLM")(config, rngs=nnx.Rngs(0))
        prompt, following = _tokens(sizes)
        cache = None

        def decode():
            nonlocal cache
            if cache is None:
                cache = peer.forward(model, prompt, None, peer.create_empty_cache(config, sizes.batch))["cache"]
            for token in following:
                out = peer.forward(model, token, None, cache)
                cache = out["cache"]
            return jax.block_until_ready(out["logits"])

        return {**passes_of_model(model, lambda model, ids: model(ids)["logits"], sizes), "decode": decode}

    return build


# Packages in PyTorch.


def passes_of_torch_model(model, run, inputs, cotangent) -> dict[Pass, Call]:
    """`run(inputs)` forward, and on to the gradient in every parameter of the model."""
    import torch

    inputs, cotangent = torch.as_tensor(inputs), torch.as_tensor(cotangent)
    return torch_passes(lambda: run(inputs), [p for p in model.parameters() if p.requires_grad], cotangent)


def _mambapy(sizes: Sizes) -> dict[Pass, Call]:
    require("torch", "mambapy")
    import torch
    from mambapy.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    model = Mamba(MambaConfig(d_model=sizes.d_model, n_layers=sizes.layers, d_state=sizes.d_state))
    inputs, positions = make_cotangent(sizes, sizes.d_model), torch.randn(sizes.tokens, sizes.batch, sizes.d_model)
    caches: list | None = None

    def decode():
        nonlocal caches
        if caches is None:
            empty = torch.zeros(sizes.batch, model.config.d_inner, model.config.d_conv - 1)
            caches = [(None, empty) for _ in range(sizes.layers)]
        with torch.no_grad():
            for x in positions:
                y, caches = model.step(x, caches)
        return y

    return {**passes_of_torch_model(model, model, inputs, make_cotangent(sizes, sizes.d_model)), "decode": decode}


def _transformers(version: Literal[1, 2], *, passes: tuple[Pass, ...], **options: Any) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        require("torch", "transformers")
        if options.get("use_mambapy"):
            require("mambapy")
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.d_model,
            "num_hidden_layers": sizes.layers,
            "state_size": sizes.d_state,
        }
        model: Any
        if version == 1:
            model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape, **options))
        else:
            heads: dict[str, Any] = {
                "head_dim": 64,
                "num_heads": 2 * sizes.d_model // 64,
                "n_groups": 1,
                "tie_word_embeddings": True,
            }
            model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shape, **heads, **options))
        model.eval()
        ids = torch.tensor(make_ids(sizes)).long()
        following = [ids[:, t : t + 1] for t in range(sizes.tokens)]
        cache = None

        def decode():
            nonlocal cache
            with torch.no_grad():
                if cache is None:
                    cache = model(ids[:, : sizes.tokens], use_cache=True).cache_params
                for token in following:
                    out = model(token, cache_params=cache, use_cache=True)
                    cache = out.cache_params
            return out.logits

        cotangent = make_cotangent(sizes, sizes.vocab_size)
        run = lambda ids: model(ids, use_cache=False).logits  # noqa: E731
        calls = {**passes_of_torch_model(model, run, ids[:, : sizes.length], cotangent), "decode": decode}
        return {which: calls[which] for which in passes}

    return build


CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "mamba": {
        "zoo.CausalLM mamba": _ours("mamba"),
        "mambapy": _mambapy,
        "transformers": _transformers(1, passes=("forward", "decode")),
        "transformers, use_mambapy": _transformers(1, passes=("forward", "backward"), use_mambapy=True),
    },
    "mamba2": {
        "zoo.CausalLM mamba2": _ours("mamba2"),
        "mamba2-jax, chunk 64": _their_jax(2, chunk_size=64),
        "mamba2-jax, chunk 256": _their_jax(2),
        "transformers, chunk 64": _transformers(2, passes=("forward", "backward", "decode"), chunk_size=64),
        "transformers, chunk 256": _transformers(2, passes=("forward", "backward")),
    },
    "mamba3": {
        "zoo.CausalLM mamba3": _ours("mamba3"),
        "mamba3-jax": _their_jax(3),
    },
    "mamba3-mimo": {
        "zoo.CausalLM mamba3 mimo": _ours("mamba3", is_mimo=True),
        "mamba3-jax mimo": _their_jax(3, is_mimo=True),
    },
}
