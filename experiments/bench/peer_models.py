"""Rows of `bench peers` for whole models: image classifiers, language models and how they generate, encoders.

Where a published layout describes our model, the peer has its parameters, and both have to give the same logits. Models
of 130m's width have few layers and a small vocabulary, so that the mixers are what counts; the model that generates
with attention has the shape of SmolLM2-135M. A prompt is read and a token decoded by the calls that `generate` is made
of; the decoded token sees the whole context.
"""

import functools
import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from experiments.bench import decode, models, monarch
from experiments.bench.contenders import JaxCall, Sizes, TorchCall, jax_passes, require
from experiments.bench.pairs import Pair, Row

# Tokens decoded in a timed call.
TOKENS = 16
# What transformers calls a cache, in one version or another.
CACHES = ("past_key_values", "cache", "cache_params")


def rows(quick: bool) -> list[Row]:
    """The rows, at the sizes of the table or at those of a trial."""
    out = []
    for size, batch in ((32, 2),) if quick else ((224, 1), (224, 8), (384, 1)):
        out.append(Row("ViT-Ti", f"{size} px, b={batch}", "timm", functools.partial(vit, size, batch, quick)))
    context = 32 if quick else 1024
    shape: dict[str, Any] = {}
    if quick:
        shape = {"d_model": 32, "layers": 1, "heads": 4, "kv_heads": 2, "d_ff": 64, "vocab_size": 64}
    llama = decode.teacher(decode.Config(patterns=("attn",), **shape))
    kinds: tuple[tuple[Literal["mamba", "mamba2"], int], ...] = (("mamba", 16), ("mamba2", 128))
    for batch in (2,) if quick else (1, 8):
        build = functools.partial(generation, lambda: zoo.CausalLM(llama, rngs=nnx.Rngs(0)), "Llama", batch, context)
        out.append(Row("generate", f"Llama, b={batch}, context {context}", "transformers", build))
        for kind, d_state in kinds:
            make = functools.partial(models.our_model, _sizes(quick, d_state, batch, context), kind)
            build = functools.partial(generation, make, _KINDS[kind], batch, context)
            out.append(Row("generate", f"{kind}, b={batch}, context {context}", "transformers", build))
    for kind, d_state in kinds:
        sizes = _sizes(quick, d_state, 1, 32 if quick else 512)
        peers: dict[str, Any] = {"transformers": functools.partial(language_model, sizes, kind)}
        other = {"mamba": "mambapy", "mamba2": "mamba2-jax, chunk 64"}[kind]
        peers[other] = functools.partial(another, sizes, kind, models.CONTENDERS[kind][other])
        for peer, build in peers.items():
            out.append(Row(kind, f"{sizes.layers} layers, l={sizes.length}", peer, build))
    for l in (32,) if quick else (128, 512, 2048):
        build = functools.partial(bert, Sizes(1, l, 64 if quick else 768, 0, 0, 1, 256, 1))
        out.append(Row("M2-BERT", f"1 layer, l={l}", "transformers BERT", build))
    return out


_KINDS = {"mamba": "Mamba", "mamba2": "Mamba2"}


def _sizes(quick: bool, d_state: int, batch: int, length: int) -> Sizes:
    d_model, layers = (32, 1) if quick else (768, 4)
    return Sizes(batch, length, d_model, 2 * d_model, 8 if quick else d_state, layers, 256, 1)


def _load_published(model: zoo.CausalLM, kind: str, **options: Any):
    """The class of transformers with our parameters."""
    require("torch", "transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        zoo.save_pretrained(model, folder, layout="transformers")
        return getattr(transformers, kind).from_pretrained(folder, **options).eval()


def _numbers(tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy()]


def vit(size: int, batch: int, quick: bool) -> Pair:
    """ViT-Ti in training mode without dropout; the gradient is that in every parameter."""
    require("torch", "timm")
    import timm
    import torch
    from safetensors.torch import load_file

    layers, patch = (1, 8) if quick else (12, 16)
    model = zoo.create("vit-tiny", rngs=nnx.Rngs(0), image_size=size, n_layers=layers, patch_size=patch, drop_path=0.0)
    peer = timm.models.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=192, depth=layers, num_heads=3, num_classes=1000
    )
    with tempfile.TemporaryDirectory() as folder:
        zoo.save_pretrained(model, folder, layout="transformers")
        peer.load_state_dict(_as_timm(load_file(Path(folder) / "model.safetensors"), layers))
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, size, size, 3), dtype=np.float32)
    dy = random.standard_normal((batch, 1000), dtype=np.float32)
    graphdef, params = nnx.split(model)
    ours = jax_passes(
        lambda params, images: nnx.merge(graphdef, params)(images), params, jnp.asarray(dy), jnp.asarray(images)
    )
    theirs = models.passes_of_torch_model(
        peer.eval(), peer, torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(dy)
    )
    return Pair(ours, theirs, {"forward": _numbers})


def _as_timm(tensors: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The file of a ViT of transformers under timm's names, queries, keys and values in one matrix."""
    import torch

    whole = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layernorm": "norm",
        "classifier": "head",
    }
    of_a_layer = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    names = whole | {
        f"vit.encoder.layer.{i}.{name}": f"blocks.{i}.{new}" for i in range(layers) for name, new in of_a_layer.items()
    }
    out = {}
    for name, new in names.items():
        for end in ("", ".weight", ".bias"):
            if name + end in tensors:
                out[new + end] = tensors[name + end]
    for i in range(layers):
        for end in ("weight", "bias"):
            parts = [f"vit.encoder.layer.{i}.attention.attention.{which}.{end}" for which in ("query", "key", "value")]
            out[f"blocks.{i}.attn.qkv.{end}"] = torch.cat([tensors[part] for part in parts])
    return out


def generation(make: Callable[[], zoo.CausalLM], kind: str, batch: int, context: int) -> Pair:
    """Reading a prompt, to the logits of its last token, and decoding a token behind as long a context."""
    require("torch", "transformers")
    model = make()
    peer = _load_published(model, f"{kind}ForCausalLM")
    import torch

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context), dtype=np.int32)
    graphdef, params = nnx.split(model)

    def read(params, ids):
        state = model.init_state(batch, context)
        return nnx.merge(graphdef, params).extend(ids, state, last_only=True)

    decoder = decode.Decoder(model)
    prompt = torch.tensor(ids).long()
    following = [prompt[:, t : t + 1] for t in range(min(TOKENS, context))]
    takes = inspect.signature(peer.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    name = next(name for name in CACHES if name in takes)
    cache = None

    @torch.no_grad()
    def read_theirs():
        return peer(prompt, use_cache=True, **last).logits[:, -1:]

    @torch.no_grad()
    def decode_theirs():
        nonlocal cache
        if cache is None:
            out = peer(prompt[:, :-1], use_cache=True)
            cache = next(getattr(out, each) for each in CACHES if getattr(out, each, None) is not None)
        for token in following:
            logits = peer(token, use_cache=True, **{name: cache}).logits
            if name == "past_key_values":
                cache.crop(context - 1)  # the position that was written comes next again, as for ours
        return logits.numpy()

    return Pair(
        {"prefill": JaxCall(read, params, jnp.asarray(ids)), "decode": decoder.call(batch, context, len(following))},
        {"prefill": TorchCall(read_theirs), "decode": TorchCall(decode_theirs)},
        {"prefill": _numbers},
        {"decode": len(following)},
    )


def _our_passes(sizes: Sizes, kind: Literal["mamba", "mamba2"]):
    model = models.our_model(sizes, kind)
    return model, models.passes_of_model(model, lambda model, ids: model(ids), sizes)


def language_model(sizes: Sizes, kind: Literal["mamba", "mamba2"]) -> Pair:
    """Logits of every position. Mamba-1's backward pass in transformers is that through mambapy's scan, without which
    it takes time quadratic in the length."""
    options: dict[str, Any] = {"use_mambapy": True} if kind == "mamba" else {"chunk_size": 64}
    require("torch", "transformers", *(["mambapy"] if kind == "mamba" else []))
    model, ours = _our_passes(sizes, kind)
    # It has no dropout, and looks for mambapy in training alone.
    peer = _load_published(model, f"{_KINDS[kind]}ForCausalLM", **options).train()
    import torch

    ids = torch.tensor(models.make_ids(sizes)[:, : sizes.length]).long()
    run = lambda ids: peer(ids, use_cache=False).logits  # noqa: E731
    theirs = models.passes_of_torch_model(peer, run, ids, models.make_cotangent(sizes, sizes.vocab_size))
    return Pair(ours, theirs, {"forward": _numbers})


def another(sizes: Sizes, kind: Literal["mamba", "mamba2"], contender) -> Pair:
    """A contender of `bench mamba` or `mamba2`, with parameters of its own."""
    theirs = contender(sizes)
    return Pair(_our_passes(sizes, kind)[1], {which: theirs[which] for which in ("forward", "backward")})


def bert(sizes: Sizes) -> Pair:
    """M2-BERT beside BERT, contenders of `bench bert`: models of equal widths, not the same one."""
    ours, theirs = (
        monarch.CONTENDERS["bert"][name](sizes) for name in ("zoo.MaskedLM m2/monarch", "transformers BertForMaskedLM")
    )
    return Pair(ours, theirs)
