"""Weights are numbers, in every layout: codes, what is not finite, and what a dtype does not hold are named."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import m2
import zoo
from zoo.models.build import build
from zoo.published.plain_weights import copied, is_finite
from zoo.published.weight_files import open_weights, save_weights

SMALL = {"d_model": 64, "n_layers": 1}
TEXT = {"vocab_size": 24, "pad_vocab_multiple": 8}
MLP = zoo.MLPConfig(d_ff=16, gated=False, activation="gelu", bias=True)
ENCODER = SMALL | TEXT | {"max_len": 8, "type_vocab_size": 2, "mlp": MLP}
CONFIGS = {
    "native": zoo.CausalLMConfig(**SMALL, **TEXT, pattern="mamba2"),
    "official": zoo.CausalLMConfig(**SMALL, **TEXT, pattern="mamba"),
    "mamba": zoo.CausalLMConfig(**SMALL, **TEXT, pattern="mamba"),
    "mamba2": zoo.CausalLMConfig(**SMALL, **TEXT, pattern="mamba2"),
    "llama": zoo.CausalLMConfig(**SMALL, **TEXT, pattern="attn/mlp"),
    "bamba": zoo.CausalLMConfig(d_model=64, n_layers=2, **TEXT, pattern="mamba2/mlp attn/mlp"),
    "bert": zoo.MaskedLMConfig(
        **ENCODER, pattern="attn/mlp", norm_place="post", attn=zoo.AttentionConfig(position="none", bias=True)
    ),
    "m2": zoo.MaskedLMConfig(**SMALL, **TEXT, pattern="m2/monarch", mixer_residual=False, m2=m2.M2Config(l_max=8)),
    "vit": zoo.ImageClassifierConfig(
        **SMALL,
        pattern="attn/mlp",
        image_size=8,
        patch_size=4,
        n_classes=3,
        attn=zoo.AttentionConfig(position="none", bias=True),
        mlp=MLP,
    ),
    "vim": zoo.ImageClassifierConfig(
        **SMALL, pattern="vim", norm="rms", norm_eps=1e-5, class_token="middle", image_size=8, patch_size=4, n_classes=3
    ),
}
LAYOUTS = {"native": "native", "official": "official", "m2": "official", "vim": "official"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a model in a layout, made once."""

    def folder(name):
        path = root / name
        if not path.exists():
            zoo.save_pretrained(build(CONFIGS[name], rngs=0), path, LAYOUTS.get(name, "transformers"))
        return path

    root = tmp_path_factory.mktemp("models")
    return folder


def changed(folder, to, change, config=None):
    """A copy of a model in which `change` makes another of the first matrix of a block. Returns its name."""
    tensors = {name: tensor.read() for name, tensor in open_weights(folder).items()}
    name = next(
        name for name, tensor in tensors.items() if re.search(r"layers?\.0\.(?!.*filter)", name) and tensor.ndim > 1
    )
    tensors[name] = change(tensors[name])
    kind = {".safetensors": "safetensors", ".bin": "bin", ".pth": "pth"}
    save_weights(to, tensors, format=next(kind[p.suffix] for p in folder.iterdir() if p.suffix in kind))
    raw = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(raw | (config or {})))
    return name.removeprefix("model.").removeprefix("bert.").removeprefix("vit.")


def with_first(value):
    def change(tensor):
        tensor = tensor.copy()
        tensor.flat[0] = value
        return tensor

    return change


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_what_is_not_finite_are_refused_in_every_layout(name, saved, tmp_path):
    for dtype in (np.int8, bool):
        there = changed(saved(name), tmp_path / np.dtype(dtype).name, lambda x, dtype=dtype: (x > 0).astype(dtype))
        with pytest.raises(ValueError, match=rf"{there} is {np.dtype(dtype)}, expected floating point: .* quantised"):
            zoo.from_pretrained(tmp_path / np.dtype(dtype).name)
    for value in (np.nan, np.inf, -np.inf):
        there = changed(saved(name), tmp_path / str(value), with_first(value))
        with pytest.raises(ValueError, match=rf"{there} holds 1 of [\d,]+ values that are infinite or not a number"):
            zoo.from_pretrained(tmp_path / str(value))
    zoo.from_pretrained(tmp_path / "nan", allow_nonfinite=True)
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    changed(saved(name), tmp_path / "said", lambda x: x, said)
    with pytest.raises(ValueError, match=r"config.json: quantization_config: the weights are quantised .'bits"):
        zoo.from_pretrained(tmp_path / "said")
    changed(saved(name), tmp_path / "null", lambda x: x, {"quantization_config": None})
    zoo.from_pretrained(tmp_path / "null")


def test_what_the_dtype_does_not_hold_is_refused(saved, tmp_path):
    changed(saved("native"), tmp_path, lambda x: with_first(1e300)(x.astype(np.float64)))
    with pytest.raises(ValueError, match=r"holds 1e\+300, which is infinite in float32; load it in another dtype"):
        zoo.from_pretrained(tmp_path)
    changed(saved("native"), tmp_path, with_first(1e5))
    assert zoo.from_pretrained(tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"holds 1e\+05, which is infinite in float16"):
        zoo.from_pretrained(tmp_path, dtype="float16")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_finite_is_what_numpy_calls_so(dtype):
    dtype = jnp.dtype(dtype)
    highest, least = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    for value in (0.0, -0.0, 1.0, -1.0, highest, -highest, least, -least, np.inf, -np.inf, np.nan, -np.nan):
        array = np.ones((3, 5), dtype)
        array[1, 2] = value
        assert is_finite(array) == bool(np.isfinite(array.astype(np.float64)).all()), value
        assert copied(array, dtype, "x", allow_nonfinite=True).tobytes() == array.tobytes()
    assert is_finite(np.zeros((0, 3), dtype))
    assert is_finite(np.zeros(3, np.int8))


def test_tied_weights_that_are_no_numbers_are_told_as_such(saved, tmp_path):
    tensors = {name: tensor.read() for name, tensor in open_weights(saved("mamba")).items()}
    name = "backbone.embeddings.weight"
    tensors[name][0, 0] = np.nan
    save_weights(tmp_path, tensors | {"lm_head.weight": tensors[name]})
    (tmp_path / "config.json").write_text((saved("mamba") / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{name} holds 1 of 1,536 values"):
        zoo.from_pretrained(tmp_path)
