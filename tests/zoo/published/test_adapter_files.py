"""Adapters alone in a folder: what comes back, what the tensors are called, and that peft reads and writes the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close
from tests.zoo.reuse.models import IDS, causal
from tests.zoo.reuse.test_adapt import moved
from zoo.published.weight_files import open_weights


def adapters(model):
    return nnx.state(model, nnx.Param)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("pattern", ["mamba2/mlp linear_attn/moe m2/monarch zamba2 zamba2", "mamba", "attn/mlp"])
def test_adapters_come_back_alone(pattern, dora, tmp_path):
    model = causal(pattern)
    tuned = moved(zoo.add_lora(model, rank=2, alpha=3.0, dora=dora, rngs=nnx.Rngs(0)))
    zoo.save_adapter(tuned, tmp_path)
    again = zoo.load_adapter(model, tmp_path)
    assert_close(adapters(again), adapters(tuned), tolerance=0.0)
    assert nnx.split(again)[0] == nnx.split(tuned)[0]
    names = set(open_weights(tmp_path / "adapter_model.safetensors"))
    theirs = {
        "mamba": "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight",
        "attn/mlp": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    }
    assert theirs.get(pattern, "backbone.layers.2.mlp.gated_layers.lora_A.weight") in names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_is_no_adapter_is_said(tmp_path):
    model = causal("attn/mlp")
    tuned = zoo.add_lora(model, rank=2, rngs=nnx.Rngs(0))
    biased = zoo.MLP(4, zoo.MLPConfig(d_ff=6, bias=True), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the model has no adapters"):
        zoo.save_adapter(model, tmp_path)
    partly = zoo.add_lora(biased, targets="down_proj", trained="up_proj.bias", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"up_proj is trained but for its kernel"):
        zoo.save_adapter(partly, tmp_path)
    with pytest.raises(ValueError, match="adapter upon another"):
        zoo.save_adapter(zoo.add_lora(tuned, rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        zoo.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj\.kernel has an adapter|kernel has an adapter"):
        zoo.save_pretrained(tuned, tmp_path / "whole")
    zoo.save_adapter(tuned, tmp_path)
    with pytest.raises(ValueError, match="is no adapter of a map of this model"):
        zoo.load_adapter(causal("mamba"), tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"bias": "all"}, "bias='all', expected 'none'"),
        ({"peft_type": "IA3"}, "peft_type='IA3', expected 'LORA'"),
        ({"r": 0}, "r=0, expected a number above 0"),
        ({"r": 3}, r"lora_A has shape \(8, 2\), expected \(8, 3\)"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=message):
            zoo.load_adapter(model, tmp_path)


@pytest.mark.parametrize("family", ["attn/mlp", "mamba2/mlp m2/monarch"])
def test_what_is_trained_as_it_is_lies_beside_the_adapters(family, tmp_path):
    model = causal(family)
    tuned = moved(zoo.add_lora(model, rank=2, trained="norm_f.*|embedding.embedding", rngs=nnx.Rngs(0)))
    zoo.save_adapter(tuned, tmp_path)
    again = zoo.load_adapter(model, tmp_path)
    assert nnx.split(again)[0] == nnx.split(tuned)[0]
    assert_close(adapters(again), adapters(tuned), tolerance=0.0)
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert len(modules) == 2
    assert ("model.norm" in modules) == (family == "attn/mlp")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_peft_reads_and_writes_the_same(family, dora, tmp_path):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    shape = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}
    config, targets = {
        "llama": (
            transformers.LlamaConfig(num_attention_heads=2, intermediate_size=12, **shape),
            ["q_proj", "down_proj"],
        ),
        "mamba": (transformers.MambaConfig(state_size=4, **shape), ["in_proj", "x_proj"]),
    }[family]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_dora=dora)).eval()
    for name, value in theirs.named_parameters():
        if "lora_" in name:
            value.data += 0.3 * torch.randn_like(value)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor(np.asarray(IDS))
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    ours = zoo.load_adapter(zoo.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    np.testing.assert_allclose(ours(IDS)[..., :11], expected, atol=1e-5)
    zoo.save_adapter(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(ids).logits.numpy(), expected, atol=1e-6)


@pytest.mark.slow
def test_quantised_weights_come_back_as_they_are(tmp_path):
    model = zoo.quantize(causal("mamba2/mlp linear_attn/moe m2/monarch"), bits=4, group_size=4, embeddings=True)
    zoo.save_pretrained(model, tmp_path)
    again = zoo.from_pretrained(tmp_path)
    assert nnx.split(again)[0] == nnx.split(model)[0]
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, nnx.state(again), nnx.state(model))))
    with pytest.raises(ValueError, match="is quantised: layout='transformers' has plain weights"):
        zoo.save_pretrained(model, tmp_path / "other", layout="transformers")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["format_version"] == 2
    name = next(iter(raw["quantized"]))
    wrong = [{"bits": bits, "group_size": 4} for bits in (5, [4, 5], [])]
    for how in (*wrong, {"bits": 4}, {"bits": 4, "group_size": 0}, None):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"quantized": raw["quantized"] | {name: how}}))
        with pytest.raises(ValueError, match="expected bits and group_size"):
            zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(raw | {"quantized": raw["quantized"] | {"no.such": raw["quantized"][name]}})
    )
    with pytest.raises(ValueError, match=r"no\.such is quantised, and the model has no such map"):
        zoo.from_pretrained(tmp_path)
