"""Checkpoints that transformers writes give its numbers here, and those written here give ours there.

Runs where torch and transformers are installed; what they once gave is kept in published/ for everywhere else.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.published.ssm_layout import read_config, write_config
from zoo.published.weight_files import open_weights, save_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

BASE = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 29, "initializer_range": 0.5}
MAMBA = {"model_type": "mamba", "state_size": 4}
FALCON = {"model_type": "falcon_mamba", "state_size": 4}
MAMBA2 = {"model_type": "mamba2", "state_size": 8, "head_dim": 4, "num_heads": 8, "n_groups": 1, "chunk_size": 32}
CASES = {
    "mamba": MAMBA,
    "mamba, biases": MAMBA | {"use_bias": True, "conv_kernel": 3, "expand": 3, "vocab_size": 31},
    "mamba, no conv bias": MAMBA | {"use_conv_bias": False, "time_step_rank": 5, "tie_word_embeddings": False},
    "mamba, bfloat16": MAMBA | {"layer_norm_epsilon": 0.01, "residual_in_fp32": False, "stored": "bfloat16"},
    "falcon_mamba": FALCON | {"tie_word_embeddings": False, "mixer_rms_eps": 0.01},
    "falcon_mamba, biases": FALCON | {"use_bias": True, "time_step_rank": 3, "layer_norm_epsilon": 0.1},
    "mamba2": MAMBA2 | {"tie_word_embeddings": True},
    "mamba2, groups": MAMBA2 | {"n_groups": 2, "use_bias": True, "use_conv_bias": False, "chunk_size": 256},
    "mamba2, 8 groups": MAMBA2 | {"n_groups": 8, "conv_kernel": 2, "layer_norm_epsilon": 0.1, "stored": "bfloat16"},
    "mamba2, limit": MAMBA2 | {"head_dim": 8, "num_heads": 6, "expand": 3, "time_step_limit": (0.02, 0.2)},
    "mamba2, half a limit": MAMBA2 | {"time_step_limit": (0.1, float("inf")), "residual_in_fp32": False},
}
LENGTHS = (1, 7, 64, 65, 300)


def randomise(model):
    """Every parameter its own; fresh models have ones and zeros in many places, where a mistake would not show."""
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last == "A_log":
            param.data.add_(0.3 * noise)
        elif last == "dt_bias" or name.endswith("dt_proj.bias"):
            param.data.copy_(noise - 2)
        elif last == "D" or "norm" in name:
            param.data.mul_(1 + 0.3 * noise)
        elif param.ndim == 2 and "embed" not in name:
            param.data.copy_(1.5 * noise / param.shape[1] ** 0.5)
        else:
            param.data.copy_(0.5 * noise)


def build(options):
    options = BASE | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None} | options
    kind, stored = options.pop("model_type"), options.pop("stored", "float32")
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model.to(getattr(torch, stored))


def theirs(model, ids, **options):
    with torch.no_grad():
        return model(torch.as_tensor(ids), **options)


def jitted(model):
    graphdef, params = nnx.split(model)
    call = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    return lambda *inputs: call(params, *inputs)


def load_theirs(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="float32")
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint by transformers: its folder, the model in float32, ours."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(CASES[request.param]).save_pretrained(folder)
    ours = zoo.from_pretrained(folder, dtype="float32")
    return folder, load_theirs(folder), ours, request.param


def test_logits_continuations_and_caches_agree(case):
    _, model, ours, name = case
    generator = np.random.default_rng(0)
    run = jitted(ours)
    ids = generator.integers(0, 29, (1, LENGTHS[-1]))
    for length in LENGTHS:
        expected = theirs(model, ids[:, :length], use_cache=False).logits.numpy()
        actual = np.asarray(run(ids[:, :length]))
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4, err_msg=str(length))
    assert expected.std() > 0.5

    prompt = ids[:, :9]
    limited = "limit" in name  # transformers forgets the limit where it goes on from a cache: take its full passes
    if limited:
        row = prompt
        for _ in range(20):
            row = np.append(row, theirs(model, row, use_cache=False).logits[:, -1:].argmax(-1).numpy(), axis=1)
    else:
        row = model.generate(
            torch.as_tensor(prompt),
            attention_mask=torch.ones(1, 9, dtype=torch.long),  # else token 0 counts as padding
            max_new_tokens=20,
            do_sample=False,
        ).numpy()
    assert np.array_equal(zoo.generate(ours, prompt, 20), row)

    layers = theirs(model, prompt, use_cache=True).cache_params.layers
    _, state = jax.jit(ours.extend)(prompt, ours.init_state(1))
    for layer, (conv, hidden) in zip(layers, state, strict=True):
        kept, recurrent = (next(iter(s.values())) if isinstance(s, dict) else s for s in cache(layer))
        np.testing.assert_allclose(conv, kept.numpy()[..., 1:].swapaxes(1, 2), rtol=0, atol=1e-4)  # they keep one more
        np.testing.assert_allclose(hidden, recurrent.numpy(), rtol=0, atol=1e-4)


def cache(layer):
    states = layer.conv_states, layer.recurrent_states
    return [s[0] if isinstance(s, list | tuple) else s for s in states]


def test_export_is_loaded_and_gives_the_same(case, tmp_path):
    folder, model, ours, _ = case
    zoo.save_pretrained(ours, tmp_path, "transformers")
    again = load_theirs(tmp_path)
    ids = np.random.default_rng(1).integers(0, 29, (2, 20))
    assert torch.equal(theirs(again, ids).logits, theirs(model, ids).logits)
    written, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    for field in written.keys() & original.keys() - {"dtype", "bos_token_id", "pad_token_id", "time_step_rank"}:
        assert written[field] == original[field], field
    assert read_config(written) == read_config(original)
    names = {key: tensor.shape for key, tensor in open_weights(folder).items()}
    assert {key: tensor.shape for key, tensor in open_weights(tmp_path).items()} == names


def test_bfloat16_is_kept_on_the_way_through(tmp_path):
    model = build(CASES["mamba2, 8 groups"])
    model.save_pretrained(tmp_path / "theirs")
    ours = zoo.from_pretrained(tmp_path / "theirs")
    assert ours.config.param_dtype == "bfloat16"
    zoo.save_pretrained(ours, tmp_path / "ours", "transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for name, param in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], param), name


@pytest.mark.parametrize(
    ("case", "name"), [("mamba, biases", "mamba1"), ("mamba2", "mamba2")], indirect=["case"], ids=["Mamba", "Mamba-2"]
)
def test_official_export_has_official_names(case, name, tmp_path):
    folder, _, ours, _ = case
    zoo.save_pretrained(ours, tmp_path, "official")
    written = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    renamed = {key.replace("embeddings", "embedding"): t.read() for key, t in open_weights(folder).items()}
    renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]  # stored though tied
    assert written.keys() == renamed.keys()
    for key, tensor in written.items():
        assert np.array_equal(tensor.numpy(), renamed[key]), key
    published = (zoo_published() / name / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text()).keys() == json.loads(published).keys()
    if name == "mamba1":  # of the same options, hence of the same tensors
        assert written.keys() == torch.load(zoo_published() / name / "pytorch_model.bin", weights_only=True).keys()


def zoo_published():
    from tests.zoo.published.test_pretrained import PUBLISHED

    return PUBLISHED


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_a_config_with_nothing_but_its_type_means_what_it_means_there(kind):
    config, expected = read_config({"model_type": kind}), transformers.AutoConfig.for_model(kind)
    for raw in (expected.to_dict(), json.loads(expected.to_json_string(use_diff=True))):
        if kind != "mamba2":
            assert raw.pop("time_step_rank") == 48  # None here, and "auto" there before it is counted out
        assert read_config(raw) == config
    written = write_config(config, "transformers")
    for field in written.keys() - {"architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}:
        if field != "time_step_rank":
            assert read_config(written | {field: getattr(expected, field)}) == config, field


def test_a_width_beside_expand_prevails_as_it_does_there(tmp_path):
    model = build(FALCON | {"tie_word_embeddings": False, "time_step_rank": 4})
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"expand": 16}))  # as in Falcon-Mamba-7B's
    ids = np.arange(20)[None]
    assert torch.equal(theirs(load_theirs(tmp_path), ids).logits, theirs(model, ids).logits)
    ours = zoo.from_pretrained(tmp_path)
    assert ours.config.mamba.expand == 2
    np.testing.assert_allclose(jitted(ours)(ids), theirs(model, ids).logits.numpy(), rtol=0, atol=1e-4)


def test_what_older_conversions_leave_in_a_folder_is_read(tmp_path):
    """Official names and a stored head under a transformers config, and fields of the original beside its own."""
    model = build(MAMBA)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    legacy = {"d_model": 16, "n_layer": 2, "ssm_cfg": {}, "d_inner": 32, "rms_norm": True, "fused_add_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(raw | legacy | {"pad_vocab_size_multiple": 8}))
    tensors = {key: tensor.read() for key, tensor in open_weights(tmp_path).items()}
    tensors["backbone.embedding.weight"] = tensors["lm_head.weight"] = tensors.pop("backbone.embeddings.weight")
    (tmp_path / "model.safetensors").unlink()
    save_weights(tmp_path, tensors, format="bin")
    ids = np.arange(20)[None]
    expected = theirs(model, ids).logits.numpy()
    np.testing.assert_allclose(jitted(zoo.from_pretrained(tmp_path))(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spelled", [float("inf"), {"__float__": "Infinity"}], ids=["Infinity", "__float__"])
def test_an_open_limit_is_read_as_it_is_spelled(spelled, tmp_path):
    build(MAMBA2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"time_step_limit": [0.0, spelled]}))
    assert zoo.from_pretrained(tmp_path).config.mamba2.dt_limit == (0.0, float("inf"))
    zoo.save_pretrained(zoo.from_pretrained(tmp_path), tmp_path / "out", "transformers")
    assert load_theirs(tmp_path / "out").config.time_step_limit == [0.0, float("inf")]


def test_left_padding_gives_what_it_gives_there(case):
    """Except where in_proj has a bias, which transformers lets padding feed into the convolution."""
    _, model, ours, name = case
    if CASES[name].get("use_bias"):
        pytest.skip("transformers feeds the bias of padding into the convolution")
    ids = np.random.default_rng(2).integers(0, 29, (2, 12))
    mask = np.ones((2, 12), bool)
    mask[1, :5] = False
    expected = theirs(model, ids, attention_mask=torch.as_tensor(mask).long(), use_cache=False).logits.numpy()
    actual = np.asarray(jitted(ours)(ids, mask))
    np.testing.assert_allclose(actual[mask], expected[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba_hf", "falcon_mamba_hf", "mamba2_hf"])
def test_hidden_states_are_those_of_the_model_without_a_head(name):
    """Asked for in float32: in bfloat16, as Falcon-Mamba's file is, either is 0.13 to 0.15 from that."""
    model = transformers.AutoModel.from_pretrained(zoo_published() / name, dtype="float32").eval()
    ids = np.load(zoo_published() / name / "expected.npz")["ids"].astype(np.int64).reshape(1, -1)
    expected = theirs(model, ids, use_cache=False, output_hidden_states=True)
    ours = zoo.from_pretrained(zoo_published() / name, dtype="float32")
    np.testing.assert_allclose(ours.hidden(jnp.asarray(ids)), expected.last_hidden_state.numpy(), rtol=0, atol=5e-5)
    # Theirs of these models leave the embedding out, and have the last layer's both before and after the norm.
    between = ours.hidden_states(jnp.asarray(ids))[1:-1]
    for state, said in zip(between, expected.hidden_states[:-2], strict=True):
        np.testing.assert_allclose(state, said.numpy(), rtol=0, atol=2e-4)


def test_both_load_the_published_checkpoints(tmp_path):
    for name in ("mamba_hf", "falcon_mamba_hf", "mamba2_hf"):
        folder = tmp_path / name
        shutil.copytree(zoo_published() / name, folder)
        expected = np.load(folder / "expected.npz")
        logits = theirs(load_theirs(folder), expected["ids"].astype(np.int64), use_cache=False).logits
        np.testing.assert_allclose(logits.numpy(), expected["logits_65"], rtol=0, atol=1e-4)
