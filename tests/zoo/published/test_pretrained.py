"""Published weights: they give their publishers' numbers, none of them is overlooked, they go out as they came in."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.places import PUBLISHED, ROOT
from zoo.published.ssm_layout import read_config, tensor_table, write_config
from zoo.published.weight_files import open_weights, save_weights

OTHERS = (
    "bert",
    "vit",
    "deit",
    "vim",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "llava",
    "jamba",
    "bamba",
    "falcon_h1",
    "granite",
    "nemotron_h",
    "zamba2",
    "attn",
)
NAMES = sorted(p.name for p in PUBLISHED.iterdir() if p.is_dir() and not any(other in p.name for other in OTHERS))
TIED = {"mamba1", "mamba3_siso", "mamba3_mimo", "mamba_hf"}
ATTENTION = {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False}
ATTENTION |= {"qkv_proj_bias": False, "rotary_emb_dim": 64}  # mamba2attn-2.7b's
OFFICIAL = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 29,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
TRANSFORMERS = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 29}
CODESTRAL = {"dim": 64, "n_layers": 1, "vocab_size": 29, "n_groups": 2, "pad_vocab_size_multiple": 1}


def arrays(name):
    return {key: tensor.read() for key, tensor in open_weights(PUBLISHED / name).items()}


def config_file(name):
    return next(PUBLISHED.joinpath(name).glob("[cp]*.json"))  # config.json or params.json


def write(folder, tensors, config):
    """A checkpoint made of these; the config is a file to copy, or what it holds."""
    save_weights(folder, tensors, format="bin")
    if isinstance(config, Path):
        shutil.copy(config, folder)
    else:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def parameters(model):
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract(config):
    return nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


def assert_same_models(model, other):
    ours, theirs = parameters(model), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, param in ours.items():
        assert param.dtype == theirs[name].dtype, name
        assert np.array_equal(param[...], theirs[name][...]), name


# What they compute


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_its_publisher(name):
    model = zoo.from_pretrained(PUBLISHED / name, dtype="float32")
    expected = np.load(PUBLISHED / name / "expected.npz")
    ids = expected["ids"]
    graphdef, params = nnx.split(model)
    call = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
    extend = jax.jit(lambda params, ids, state: nnx.merge(graphdef, params).extend(ids, state))

    def feed(state, *pieces):
        outputs = []
        for piece in pieces:
            logits, state = extend(params, piece, state)
            outputs.append(np.asarray(logits))
        return np.concatenate(outputs, axis=1), state

    def assert_close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)

    start = model.init_state(1)
    assert_close(call(params, ids), expected["logits_65"])
    assert_close(feed(start, ids[:, :1])[0], expected["logits_1"])
    assert_close(feed(start, ids[:, :7])[0], expected["logits_7"])
    # In pieces of many tokens and of one.
    assert_close(feed(start, *np.split(ids, [*range(7, 64, 7), 64], axis=1)[:-1])[0], expected["logits_65"][:, :64])

    logits, state = feed(start, ids[:, :7], ids[:, 7:8], ids[:, 8:9])
    assert_close(logits, expected["logits_65"][:, :9])
    compared = 0
    for i, layer in enumerate(state):
        for j, (field, actual) in enumerate(layer._asdict().items()):
            key = f"state_{i}_{j}"
            if key not in expected:
                continue
            theirs = expected[key]
            if field == "conv":  # they keep the newest d_conv inputs, the last axis the newest last
                theirs = theirs[..., 1:].swapaxes(1, 2)
            difference = np.asarray(actual) - theirs
            if field == "angle":
                difference = (difference + np.pi) % (2 * np.pi) - np.pi
            assert difference.shape == theirs.shape
            assert np.abs(difference).max() < 1e-4, key
            compared += 1
    assert compared > 0

    vocab_size, tokens = model.config.vocab_size, []
    for _ in range(20):
        tokens.append(int(logits[0, -1, :vocab_size].argmax()))
        logits, state = feed(state, np.array([tokens[-1:]]))
    assert tokens == expected["greedy"][0].tolist()

    both = zoo.generate(model, [ids[0, :9].tolist(), ids[0, 4:9].tolist()], 20)  # the second is padded on the left
    assert np.array_equal(both[:, 9:], np.concatenate([expected["greedy"], expected["greedy_short"]]))


# What is read


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_the_file_is_in_one_parameter(name, tmp_path):
    tensors, begin = {}, 0
    where = {}
    for key, tensor in sorted(arrays(name).items()):
        where[key] = begin
        tensors[key] = np.arange(begin, begin + tensor.size, dtype=np.float32).reshape(tensor.shape)
        begin += tensor.size
    tied = name in TIED and "lm_head.weight" in tensors
    if tied:
        embedding = next(key for key in tensors if "embedding" in key)
        tensors["lm_head.weight"] = tensors[embedding]
    model = zoo.from_pretrained(write(tmp_path, tensors, config_file(name)))

    numbers = np.concatenate([np.asarray(p[...], np.float32).ravel() for p in parameters(model).values()])
    expected = np.concatenate([t.ravel() for key, t in tensors.items() if not (tied and key == "lm_head.weight")])
    assert np.array_equal(np.sort(numbers), np.sort(expected))
    # And no parameter is made of two tensors.
    starts = np.array(sorted(where.values()))
    for path, param in parameters(model).items():
        value = np.asarray(param[...])
        assert len({int(np.searchsorted(starts, x, "right")) for x in (value.min(), value.max())}) == 1, path


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_abstract_and_metadata_is_that_of_a_fresh_model(name):
    model = zoo.from_pretrained(PUBLISHED / name)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    fresh = parameters(abstract(model.config))
    for path, param in parameters(model).items():
        assert param.get_metadata() == fresh[path].get_metadata(), path
    spared = {path.rpartition(".")[2] for path, param in fresh.items() if param.get_metadata().get("decay") is False}
    assert "D" in spared
    assert "scale" in spared


def test_an_optimizer_knows_what_not_to_decay():
    from experiments.loop.optim import OptimConfig, make_optimizer

    model = zoo.from_pretrained(PUBLISHED / "mamba1")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5), 10, model)

    @jax.jit
    def updates(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    change = updates(params)["backbone"]["layers"][0]["mixer"]
    before = params["backbone"]["layers"][0]["mixer"]
    np.testing.assert_allclose(change["in_proj"]["kernel"], -0.5 * before["in_proj"]["kernel"], rtol=1e-5)
    for leaf in (change["A_log"], change["D"], change["dt_proj"]["bias"], change["in_proj"]["bias"]):
        assert not np.any(leaf)


WIDE = re.compile(r"(A_log|D|dt_bias|dt_proj\.bias|[BC]_bias|mimo_[xzo]|scale)$")


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_leaves_what_is_sensitive_in_float32(name):
    model = zoo.from_pretrained(PUBLISHED / name, dtype=jnp.bfloat16)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    exact = parameters(zoo.from_pretrained(PUBLISHED / name, dtype="float32"))
    for path, param in parameters(model).items():
        wide = WIDE.search(path) is not None
        assert param.dtype == (jnp.float32 if wide else jnp.bfloat16), path
        assert np.array_equal(param[...], exact[path][...].astype(param.dtype)), path


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(name):
    stored = "bfloat16" if name in ("codestral", "falcon_mamba_hf") else "float32"
    model = zoo.from_pretrained(PUBLISHED / name)
    assert (model.config.dtype, model.config.param_dtype) == (stored, stored)
    assert model.embedding.embedding.dtype == stored


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("mamba1", zoo.CausalLM, zoo.MaskedLM),
        ("vit_model", zoo.ImageClassifier, zoo.CausalLM),
        ("bert_token_classification", zoo.TokenClassifier, zoo.MaskedLM),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(name, found, expected, monkeypatch):
    assert type(zoo.from_pretrained(PUBLISHED / name, kind=found)) is found
    # The first that looks at values.
    monkeypatch.setattr("zoo.published.pretrained._require_a_fit", lambda *_: pytest.fail("weights were read"))
    message = rf"config\.json: the model is a {found.__name__}, expected kind={expected.__name__}$"
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(PUBLISHED / name, kind=expected)


def test_the_file_can_go_once_it_is_read(tmp_path):
    folder = write(tmp_path, arrays("mamba1"), config_file("mamba1"))
    model = zoo.from_pretrained(folder)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    with (folder / "pytorch_model.bin").open("r+b") as file:
        file.write(bytes(os.path.getsize(file.name)))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.to_pure_dict(nnx.state(model))))


# What does not fit


def without(name):
    return lambda tensors: tensors.pop(name)


def with_tensor(name, value):
    return lambda tensors: tensors.update({name: value})


EXTRA = np.zeros((2, 3), np.float32)
A_LOG = "backbone.layers.1.mixer.A_log"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(A_LOG), f"do not fit the config. 1 missing in the file: {A_LOG}"),
        (without("backbone.embedding.weight"), "1 missing in the file: backbone.embedding.weight"),
        (with_tensor("backbone.extra", EXTRA), "1 in the file that the model does not have: backbone.extra"),
        (with_tensor(A_LOG, EXTRA), rf"1 of another shape: {A_LOG} is \(2, 3\), expected \(48, 8\)"),
        (with_tensor(f"model.{A_LOG}", EXTRA), "differ in the prefix 'model.' alone"),
        (
            with_tensor("lm_head.weight", np.zeros((32, 16), np.float32)),
            "lm_head.weight differs from backbone.em",
        ),
        (
            with_tensor("lm_head.weight", np.zeros((16, 32), np.float32)),
            "lm_head.weight differs from backbone.em",
        ),
        (
            with_tensor("backbone.embedding.weight", EXTRA[0, :1].reshape(())),
            r"backbone.embedding.weight is \(\), expected \(32, 16\)",
        ),
        (with_tensor("backbone.embedding.weight", np.ones((32, 16), np.int8)), "dtype='int8', expected one of"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    tensors = arrays("mamba1")
    change(tensors)
    folder = write(tmp_path, tensors, config_file("mamba1"))
    with pytest.raises(ValueError, match=message) as caught:
        zoo.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_many_tensors_are_counted_and_the_first_named(tmp_path):
    tensors = {name: tensor for name, tensor in arrays("mamba1").items() if "layers" not in name}
    message = r"24 missing in the file: backbone.layers.0.mixer.A_log, .*, \.\.\.$"
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(write(tmp_path, tensors, config_file("mamba1")))


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows", "expected"),
    [
        (29, 8, 32, (29, 8)),
        (29, 16, 32, (29, 16)),
        (29, 8, 29, (29, 1)),  # the config's default, which this checkpoint does not follow
        (32, 1, 32, (32, 1)),
        (29, 8, 128, (29, 128)),
        (29, 8, 31, None),
        (29, 8, 40, None),
        (33, 8, 32, None),
    ],
)
def test_padding_of_the_vocabulary_is_read_off_the_embedding(vocab_size, multiple, rows, expected, tmp_path):
    tensors = arrays("mamba1")
    embedding = np.resize(tensors["backbone.embedding.weight"], (rows, 16))
    tensors |= {"backbone.embedding.weight": embedding, "lm_head.weight": embedding}
    raw = json.loads(config_file("mamba1").read_text())
    folder = write(tmp_path, tensors, raw | {"vocab_size": vocab_size, "pad_vocab_size_multiple": multiple})
    if expected is None:
        with pytest.raises(ValueError, match=rf"backbone.embedding.weight is \({rows}, 16\), expected \("):
            zoo.from_pretrained(folder)
    else:
        config = zoo.from_pretrained(folder).config
        assert (config.vocab_size, config.pad_vocab_multiple) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OFFICIAL | {"d_modle": 3}, "unknown field of an official config 'd_modle', did you mean 'd_model'"),
        (OFFICIAL | {"ssm_cfg": {"d_stat": 3}}, "ssm_cfg: unknown option of Mamba1 'd_stat', did you mean 'd_state'"),
        (OFFICIAL | {"ssm_cfg": {"headdim": 3}}, "unknown option of Mamba1 'headdim'"),
        (OFFICIAL | {"ssm_cfg": {"A_init_range": [1, 2]}}, "unknown option of Mamba1 'A_init_range'"),
        (OFFICIAL | {"ssm_cfg": {"layer": "Mamba2", "A_activation": "softplus"}}, "option of Mamba2 'A_activation'"),
        (OFFICIAL | {"ssm_cfg": {"layer": "Mamba4"}}, "ssm_cfg.layer='Mamba4', expected one of Mamba1, Mamba2, Mamba3"),
        (OFFICIAL | {"ssm_cfg": {"layer": "Mamba2"}}, "head_dim=64 must divide"),
        (OFFICIAL | {"attn_layer_idx": [1]}, "attn_cfg: num_heads is missing"),
        (OFFICIAL | {"attn_layer_idx": [9]}, "attn_layer_idx: 9, expected layers 0 to "),
        (
            OFFICIAL | {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}},
            "attn_cfg: causal=False, the official defau",
        ),
        (
            OFFICIAL | {"attn_layer_idx": [1], "attn_cfg": ATTENTION | {"mlp_dim": 256}},
            "attn_cfg: mlp_dim=256 is not s",
        ),
        (OFFICIAL | {"attn_layer_idx": [1], "attn_cfg": {"heads": 2}}, "unknown option of MHA 'heads'"),
        (OFFICIAL | {"d_model": "16"}, "config.json: "),
        (TRANSFORMERS | {"model_type": "mamba3"}, "unknown model_type 'mamba3', did you mean 'mamba"),
        (TRANSFORMERS | {"model_type": "zamba"}, "unknown model_type 'zamba'"),
        (TRANSFORMERS | {"model_type": None}, "unknown model_type 'None'"),
        (TRANSFORMERS | {"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu'"),
        (
            TRANSFORMERS | {"model_type": "mamba2", "num_heads": 3, "head_dim": 8},
            "num_heads . head_dim=24, expected .* 32",
        ),
        (CODESTRAL | {"model_type": "transformer"}, "model_type='transformer' in a params.json, expected 'mamba'"),
        (CODESTRAL | {"d_state": 16}, "unknown field of a params.json 'd_state'"),
        ({"vocab_size": 29}, "of no layout that is known"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "holds list, expected an object"),
    ],
)
def test_config_errors_name_the_file_and_the_option(config, message, tmp_path):
    folder = write(tmp_path, arrays("mamba1"), config)
    with pytest.raises(ValueError, match=message) as caught:
        zoo.from_pretrained(folder)
    assert "config.json" in str(caught.value)


def test_mamba3_ignores_unknown_options_aloud_as_its_authors_do_silently():
    unknown = {"d_conv": 4, "A_init_range": [1, 16]}
    with pytest.warns(UserWarning, match=r"ssm_cfg has \['A_init_range', 'd_conv'\]: ignored"):
        config = read_config(OFFICIAL | {"ssm_cfg": {"layer": "Mamba3"} | unknown})
    assert config.mamba3 == ssm.Mamba3Config()


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json or params.json"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    with pytest.raises(FileNotFoundError, match=r"holds no weights, looked for model.safetensors"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: .*empty"):
        zoo.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a name on the hub"):
        zoo.from_pretrained("nowhere")


# Out and in again

HOLDS = {
    "official": {"mamba1", "mamba2", "mamba3_siso", "mamba3_mimo", "mamba_hf", "mamba2_hf", "codestral"},
    "transformers": {"mamba1", "mamba_hf", "falcon_mamba_hf", "mamba2_hf", "codestral"},
}


@pytest.mark.parametrize("layout", HOLDS)
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_is_the_same(name, layout, tmp_path):
    if layout == "transformers":
        pytest.importorskip("safetensors")
    model = zoo.from_pretrained(PUBLISHED / name)
    if name not in HOLDS[layout]:
        with pytest.raises(ValueError, match=f"(in|has no) (the )?{layout} layout"):
            zoo.save_pretrained(model, tmp_path, layout)
        assert not list(tmp_path.iterdir())
        return
    zoo.save_pretrained(model, tmp_path, layout, max_shard_bytes=8_000)
    assert len(list(tmp_path.glob("*.index.json"))) == 1
    again = zoo.from_pretrained(tmp_path)
    assert_same_models(model, again)
    expected = model.config
    if layout == "transformers":  # where rows of padding are tokens
        rows = expected.padded_vocab_size
        expected = dataclasses.replace(expected, vocab_size=rows, pad_vocab_multiple=1)
    assert again.config == expected


@pytest.mark.parametrize("name", NAMES)
def test_saved_names_are_the_published_ones(name):
    model = zoo.from_pretrained(PUBLISHED / name)
    layout = "official" if name in ("codestral", "mamba1", "mamba2", "mamba3_siso", "mamba3_mimo") else "transformers"
    names = {key.removeprefix("model.") for key in arrays(name)}
    assert set(tensor_table(model, layout).entries) == names - ({"lm_head.weight"} if name in TIED else set())


def lm(pattern="mamba", **options):
    fields = {"d_model": 16, "n_layers": 2, "vocab_size": 29, "pattern": pattern}
    return zoo.CausalLMConfig(**fields | options)


def mamba(**options):
    return lm(mamba=ssm.MambaConfig(**options))


def mamba2(pattern="mamba2", norm_eps=1e-5, **options):
    return lm(pattern, norm_eps=norm_eps, mamba2=ssm.Mamba2Config(head_dim=8, **options), mlp=MLP)


def mamba3(pattern="mamba3", **options):
    return lm(pattern, mamba3=ssm.Mamba3Config(**options), mlp=MLP)


MLP = zoo.published.ssm_layout.official_mlp(100)
NEITHER: tuple[str, ...] = ()
OURS, THEIRS, BOTH = ("official",), ("transformers",), ("official", "transformers")


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (lm(), BOTH),
        (mamba(dt_rank=3, d_state=4, d_conv=3, bias=True, conv_bias=False), BOTH),
        (mamba(dt_init="constant", dt_scale=2.0, dt_min=0.01, dt_floor=1e-3), BOTH),
        (mamba(bcdt_rms=True, bcdt_rms_eps=1e-5), THEIRS),
        (mamba(expand=1.5), OURS),
        (lm(norm="layer", tie_embeddings=False, residual_in_fp32=False), OURS),
        (lm(norm="layer", norm_eps=1e-6), NEITHER),
        (mamba2(n_groups=2, bias=True), BOTH),
        (mamba2(dt_limit=(0.01, math.inf)), BOTH),
        (mamba2(dt_limit=(0.01, 0.5)), BOTH),
        (mamba2(d_ssm=16, rmsnorm=False, conv_init=0.1, A_min=2.0), OURS),
        (mamba2(norm_before_gate=True, D_has_hdim=True), OURS),
        (mamba2("mamba2/mlp", d_ssm=16), OURS),
        (mamba2(norm_eps=1e-6), NEITHER),
        (lm("mamba2", norm_eps=1e-6, mamba2=ssm.Mamba2Config(norm_eps=1e-6, head_dim=8)), THEIRS),
        (mamba3(A_activation="softplus", A_floor=1e-3), OURS),
        (mamba3(is_outproj_norm=True, d_state=32, head_dim=8, n_groups=2), OURS),
        (mamba3("mamba3/mlp", is_mimo=True, mimo_rank=2, rope_fraction=1.0), OURS),
    ],
    ids=lambda value: value.pattern if isinstance(value, zoo.CausalLMConfig) else "",
)
def test_configs_go_out_and_in(config, layouts):
    for layout in ("official", "transformers"):
        if layout not in layouts:
            with pytest.raises(ValueError, match=f"(in|has no) (the )?{layout} layout"):
                write_config(config, layout)
            continue
        again = read_config(json.loads(json.dumps(write_config(config, layout))))
        if layout == "transformers":  # where rows of padding are tokens
            again = dataclasses.replace(again, vocab_size=29, pad_vocab_multiple=config.pad_vocab_multiple)
        if not config.pattern.endswith("/mlp"):
            again = dataclasses.replace(again, mlp=config.mlp)
        assert again == config


def test_infinity_is_written_so_that_the_file_stays_json(tmp_path):
    raw = write_config(lm("mamba2", mamba2=ssm.Mamba2Config(head_dim=8)), "transformers")
    assert json.loads(json.dumps(raw, allow_nan=False))["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    for spelled in (math.inf, "Infinity", "inf", {"__float__": "Infinity"}):
        assert read_config(raw | {"time_step_limit": [0.0, spelled]}).mamba2.dt_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (lm("mamba3"), "transformers", "pattern='mamba3' has no transformers layout; those that have one: mamba, mam"),
        (lm("attn/mlp"), "official", "pattern='attn/mlp' has no official layout"),
        (lm("mamba attn[window=3]"), "official", "attn.window=3 cannot be written in the official layout"),
        (lm("mamba attn attn[window=3]", n_layers=3), "official", "attn[window=3]' has no official layout"),
        (lm("mamba attn/mlp"), "official", "pattern='mamba attn/mlp' has no official layout"),
        (lm("mamba[d_state=4]"), "official", "pattern='mamba[d_state=4]' has no official layout"),
        (lm("mamba2/mlp[d_ff=128]*2", mlp=MLP), "official", "pattern='mamba2/mlp[d_ff=128]*2' has no official layout"),
        (lm("-/mlp"), "official", "pattern='-/mlp' has no official layout"),
        (lm("mamba mamba/mlp", mlp=MLP), "official", "pattern='mamba mamba/mlp' has no official layout"),
        (lm("mamba/mlp"), "transformers", "mamba.bcdt_rms=False cannot be written in the tra"),
        (lm("mamba/mlp", mlp=MLP), "transformers", "mamba.bcdt_rms=False cannot be written in the tra"),
        (lm(norm="layer"), "transformers", "norm='layer' cannot be written in the transformers layout, only 'rms'"),
        (lm(norm_eps=1e-6), "official", "norm_eps=1e-06 cannot be written in the official layout, only 1e-05"),
        (mamba2(norm_eps=1e-6), "transformers", "mamba2.norm_eps=1e-05 cannot be written"),
        (mamba2(d_ssm=16), "transformers", "mamba2.d_ssm=16 cannot be written in the transformers layout, only None"),
        (mamba2(rmsnorm=False), "transformers", "mamba2.rmsnorm=False cannot be written"),
        (mamba(bcdt_rms=True), "official", "mamba.bcdt_rms=True cannot be written in the official layout, only False"),
        (mamba(expand=1.5), "transformers", "mamba.expand=1.5 cannot be written in the transformers layout"),
        (lm("mamba/mlp"), "official", "mlp.d_ff=48 cannot be written in the official layout, only multiples of 128"),
        (lm("mamba/mlp", mlp=zoo.MLPConfig(d_ff=128, bias=True)), "official", "mlp.bias=True cannot be written"),
        (lm("mamba/mlp", mlp=zoo.MLPConfig(d_ff=128, gated=False)), "official", "mlp.gated=False cannot be written"),
    ],
    ids=lambda value: value.pattern if isinstance(value, zoo.CausalLMConfig) else None,
)
def test_what_a_layout_cannot_hold_is_named(config, layout, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_config(config, layout)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_layout_is_named():
    with pytest.raises(ValueError, match=r"unknown layout 'huggingface'. Known: native, official, transformers"):
        write_config(lm(), "huggingface")


@pytest.mark.parametrize("layout", HOLDS)
def test_more_fields_go_into_the_config_where_its_readers_take_them(layout, tmp_path):
    pytest.importorskip("safetensors")
    model = zoo.from_pretrained(PUBLISHED / "mamba_hf")
    if layout == "official":
        with pytest.raises(ValueError, match="unknown field of an official config 'eos_token_id'"):
            zoo.save_pretrained(model, tmp_path, layout, extra={"eos_token_id": 3})
        assert not list(tmp_path.iterdir())
        return
    zoo.save_pretrained(model, tmp_path, layout, extra={"eos_token_id": 3})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
    assert_same_models(model, zoo.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"extra=\{'use_bias': True\} describes another model"):
        zoo.save_pretrained(model, tmp_path / "other", layout, extra={"use_bias": True})


# Where parameters go

PROGRAM = """
import sys, jax, numpy as np, zoo
from flax import nnx
from pathlib import Path

folder = Path(sys.argv[1])
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for name in ("mamba1", "mamba3_mimo"):
    model = zoo.from_pretrained(folder / name, sharding=zoo.shard_largest(mesh))
    whole = nnx.to_pure_dict(nnx.state(zoo.from_pretrained(folder / name)))
    params = nnx.to_pure_dict(nnx.state(model))
    for path, leaf in jax.tree.leaves_with_path(params):
        cut = any(width % 8 == 0 for width in leaf.shape)
        assert cut or name != "mamba1", path  # every parameter of this one can be cut
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.size * (8 if cut else 1) == leaf.size, path
    assert jax.tree.all(jax.tree.map(np.array_equal, params, whole))
    if name == "mamba1":
        expected = np.load(folder / name / "expected.npz")
        graphdef, state = nnx.split(model)
        logits = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, expected["ids"][:, :7])
        np.testing.assert_allclose(logits, expected["logits_7"], rtol=0, atol=1e-4)
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
model = zoo.from_pretrained(folder / "mamba2", sharding=everywhere)
assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(nnx.state(model)))

axes = ("data", "fsdp", "sequence", "tensor", "expert")
mesh = jax.make_mesh((1, 4, 1, 2, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 5)
named = nnx.state(zoo.from_pretrained(folder / "mamba1", sharding=mesh))
with jax.set_mesh(mesh):
    ambient = nnx.state(zoo.from_pretrained(folder / "mamba1"))
for one, other in zip(jax.tree.leaves(named), jax.tree.leaves(ambient), strict=True):
    assert one.sharding == other.sharding and np.array_equal(one, other)
total, held = (sum(size(x) for x in jax.tree.leaves(named)) for size in (
    lambda x: x.size * (x.ndim > 1), lambda x: x.addressable_shards[0].data.size * (x.ndim > 1)))
assert held <= 1.01 * total / 8, (held, total)
"""


@pytest.mark.slow
def test_eight_devices_hold_an_eighth_each():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", PROGRAM, str(PUBLISHED)]
    result = subprocess.run(arguments, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("unchecked")  # a mesh without devices is none to the annotation
def test_shard_largest_cuts_the_largest_dimension_that_divides():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    rule = zoo.shard_largest(mesh)
    assert [rule((), shape).spec for shape in [(8, 16), (8, 18), (8, 8), (6,), ()]] == [
        jax.P(None, "data"), jax.P("data", None), jax.P("data", None), jax.P(None), jax.P(),
    ]  # fmt: skip
    assert zoo.shard_largest(mesh, "model")((), (6,)).spec == jax.P("model")
    with pytest.raises(ValueError, match="axis='modle', expected one of data, model"):
        zoo.shard_largest(mesh, "modle")


# The hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """What HF_HUB_CACHE and HF_HUB_OFFLINE=1 set, in a process that has read them already."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", ["mamba1", "mamba2_hf", "codestral"])
def test_a_hub_name_is_found_in_the_cache(name, hub_cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub_cache / "models--owner--some.name"
    shutil.copytree(PUBLISHED / name, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    model = zoo.from_pretrained("owner/some.name")
    assert_same_models(model, zoo.from_pretrained(PUBLISHED / name))
    assert_same_models(model, zoo.from_pretrained("owner/some.name", revision=commit))
    with pytest.raises(FileNotFoundError, match=r"owner/some.name is no folder here, and not to be had from the hub"):
        zoo.from_pretrained("owner/some.name", revision="another")


def test_a_name_that_is_not_cached_is_an_error_of_one_line(hub_cache):
    message = "state-spaces/mamba-130m is no folder here, and not to be had from the hub: .*"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        zoo.from_pretrained("state-spaces/mamba-130m")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="owner/name is no folder; to load from the hub: pip install huggingface_hub"):
        zoo.from_pretrained("owner/name")


@pytest.mark.parametrize(
    ("held", "fetched"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, {"model.safetensors"}),
        ({"model-00001-of-00002.safetensors", "consolidated.safetensors"}, {"model-00001-of-00002.safetensors"}),
        ({"consolidated.safetensors"}, {"consolidated.safetensors"}),
        ({"pytorch_model.bin"}, {"pytorch_model.bin"}),
        ({"pytorch_model.bin", "training.pth"}, {"pytorch_model.bin"}),
        ({"vim_t_midclstok_76p1acc.pth"}, {"vim_t_midclstok_76p1acc.pth"}),
    ],
)
def test_weights_are_downloaded_in_one_format(held, fetched, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(repo, *, revision, allow_patterns):
        there = [*held, "config.json", "chat_template.jinja", "README.md"]
        for name in hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert zoo.published.pretrained.find_folder("owner/name") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == fetched | {"config.json", "chat_template.jinja"}


# Configs as published, and the sizes that they describe

MAMBA_HF = {  # state-spaces/mamba-130m-hf, with what it kept of the original
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
FALCON = {  # tiiuae/falcon-mamba-7b: its expand is not the ratio of its widths
    "_name_or_path": "./", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
    "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1,
    "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba", "num_hidden_layers": 64,
    "pad_token_id": 11, "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16,
    "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
    "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "vocab_size": 65024,
}  # fmt: skip
FLAGS = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
MAMBA1 = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}} | FLAGS | {"pad_vocab_size_multiple": 8}
MAMBA2 = MAMBA1 | {"d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}}
MAMBA2 |= {"pad_vocab_size_multiple": 16, "tie_embeddings": True}
MAMBA3 = MAMBA2 | {"n_layer": 12, "d_intermediate": 1536, "vocab_size": 128256, "pad_vocab_size_multiple": 8}
MAMBA3 |= {"ssm_cfg": {"layer": "Mamba3", "d_state": 128, "headdim": 64, "is_mimo": False, "chunk_size": 64}}
MIMO = MAMBA3["ssm_cfg"] | {"is_mimo": True, "mimo_rank": 4, "chunk_size": 16}
CODESTRAL_7B = {"dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8} | FLAGS
CODESTRAL_7B |= {"pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"}
CODESTRAL_HF = {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 32768}
CODESTRAL_HF |= {"num_heads": 128, "head_dim": 64, "n_groups": 8, "state_size": 128, "intermediate_size": 8192}
HYBRID = MAMBA2 | {"d_model": 2560, "n_layer": 64, "attn_layer_idx": [9, 18, 27, 36, 45, 56], "attn_cfg": ATTENTION}


@pytest.mark.parametrize(
    ("raw", "preset", "parameters"),
    [
        pytest.param(MAMBA1, "mamba-130m", 129_135_360, id="mamba-130m"),
        pytest.param(MAMBA2, "mamba2-130m", 128_989_632, id="mamba2-130m"),
        pytest.param(MAMBA3, "mamba3-siso-187m", 186_849_600, id="mamba3-siso-187m"),
        pytest.param(
            MAMBA3 | {"d_intermediate": 1264, "ssm_cfg": MIMO}, "mamba3-mimo-187m", 187_291_968, id="mamba3-mimo-187m"
        ),
        pytest.param(MAMBA_HF, "mamba-130m", 129_135_360, id="mamba-130m-hf"),
        pytest.param(FALCON, "falcon-mamba-7b", 7_272_665_088, id="falcon-mamba-7b"),
        pytest.param(CODESTRAL_7B, "codestral-mamba-7b", 7_285_403_648, id="codestral, its own"),
        pytest.param(CODESTRAL_HF, "codestral-mamba-7b", 7_285_403_648, id="codestral, transformers"),
    ],
)
def test_published_configs_describe_the_published_models(raw, preset, parameters):
    config = read_config(json.loads(json.dumps(raw)))

    def count(n_layers):
        model = abstract(dataclasses.replace(config, n_layers=n_layers))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))

    one, two = count(1), count(2)  # all layers are alike
    assert one + (config.n_layers - 1) * (two - one) == parameters
    ours = zoo.presets[preset]
    rows = {"vocab_size": ours.padded_vocab_size, "pad_vocab_multiple": 1}
    explicit = {"mamba": dataclasses.replace(ours.mamba, dt_rank=config.mamba.dt_rank)}
    config = dataclasses.replace(config, **rows)
    assert config == dataclasses.replace(ours, **rows, **explicit)


def test_the_published_config_of_the_official_hybrid_describes_the_preset():
    config, preset = read_config(HYBRID), zoo.presets["mamba2attn-2.7b"]
    assert config == preset


def test_names_that_wrappers_gave_are_those_of_the_model(tmp_path):
    """torch.compile puts _orig_mod. before the names of what it compiled, parallel training module. before all."""
    tensors = {name: tensor.read() for name, tensor in open_weights(PUBLISHED / "mamba_hf").items()}
    wrapped = {f"module._orig_mod.{name}".replace("layers.0.", "layers.0._orig_mod."): x for name, x in tensors.items()}
    save_weights(tmp_path, wrapped, format="bin")
    shutil.copy(PUBLISHED / "mamba_hf" / "config.json", tmp_path)
    read, expected = (nnx.state(zoo.from_pretrained(folder)) for folder in (tmp_path, PUBLISHED / "mamba_hf"))
    jax.tree.map(np.testing.assert_array_equal, read, expected)


def test_fields_that_no_model_reads_are_taken_beside_an_official_config():
    raw = {"d_model": 64, "n_layer": 1, "vocab_size": 24}
    said = {"seq_len": 2048, "eos_token_id": 0, "transformers_version": "4.37.0", "quantization_config": None}
    assert read_config(raw | said) == read_config(raw)
    with pytest.raises(ValueError, match="unknown field of an official config 'seq_lenn'"):
        read_config(raw | {"seq_lenn": 1})


def test_an_adapter_is_told_to_be_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/model"}')
    (tmp_path / "adapter_model.safetensors").touch()
    for config in (None, '{"model_type": "llama"}'):
        if config:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match="holds an adapter of 'some/model', no model: merge it into that"):
            zoo.from_pretrained(tmp_path)
