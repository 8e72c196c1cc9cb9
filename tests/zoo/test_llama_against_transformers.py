"""Llamas that transformers writes give its numbers here, and those written here give ours there.

Runs where torch and transformers are installed; what they once gave is kept in published/ for everywhere else.
"""

import numpy as np
import pytest

import zoo
from tests.numerics import jitted
from zoo.layouts import read_config
from zoo.weight_files import open_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

BASE = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 29, "intermediate_size": 20, "num_attention_heads": 3}
BASE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None}
CASES = {
    "plain": {},
    "tied, one pair of key and value heads": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "wide heads, another base": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "another activation": {"hidden_act": "gelu_pytorch_tanh"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint by transformers, every parameter its own: its folder, the model, ours."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | CASES[request.param])).eval()
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        scale = 0.5 if "embed" in name else 0.3 if param.ndim == 1 else 1.5 / param.shape[1] ** 0.5
        param.data.copy_(scale * noise + ("norm" in name))
    model.save_pretrained(folder)
    return folder, model, zoo.from_pretrained(folder)


def theirs(model, ids, **options):
    with torch.no_grad():
        return model(torch.as_tensor(ids), **options).logits.numpy()


def test_logits_and_continuations_agree_with_padding_on_the_left(case):
    _, model, ours = case
    ids, mask = np.random.default_rng(0).integers(1, 29, (2, 65)), np.ones((2, 65), bool)
    mask[1, :20] = False
    call, params = jitted(ours)
    expected = theirs(model, ids, attention_mask=torch.as_tensor(mask).long())
    np.testing.assert_allclose(call(params, ids, mask)[mask], expected[mask], rtol=0, atol=1e-4)
    assert expected.std() > 0.5
    prompts = torch.as_tensor(ids[:, :30] * mask[:, :30])
    options = {"attention_mask": torch.as_tensor(mask[:, :30]).long(), "max_new_tokens": 20, "do_sample": False}
    rows = zoo.generate(ours, [row[there].tolist() for row, there in zip(ids[:, :30], mask[:, :30], strict=True)], 20)
    assert np.array_equal(rows[:, -20:], model.generate(prompts, **options).numpy()[:, -20:])


def test_export_is_loaded_and_gives_the_same(case, tmp_path):
    folder, model, ours = case
    zoo.save_pretrained(ours, tmp_path, "transformers")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = np.random.default_rng(1).integers(0, 29, (2, 20))
    assert np.array_equal(theirs(again.eval(), ids), theirs(model, ids))
    names = {key: tensor.shape for key, tensor in open_weights(folder).items()}
    assert {key: tensor.shape for key, tensor in open_weights(tmp_path).items()} == names


def test_a_config_with_nothing_but_its_type_means_what_it_means_there():
    expected = transformers.LlamaConfig()
    assert read_config({"model_type": "llama"}) == read_config(expected.to_dict())
    assert read_config({"model_type": "llama"}) == read_config({"model_type": "llama"} | expected.to_diff_dict())


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_frequencies_are_refused_as_transformers_writes_them(kind, tmp_path):
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, rope_parameters=scaling)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"rope_type='{kind}' is not supported"):
        zoo.from_pretrained(tmp_path)
