"""Vision Mamba's checkpoints: the numbers of its formulas, sizes out of tensors, files in and out, what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from ssm import MambaConfig
from tests.numerics import jitted
from tests.places import PUBLISHED
from zoo.published import vim_layout
from zoo.published.weight_files import open_weights, save_weights

NAMES = ("vim", "vim_stride8")
FILE = PUBLISHED / "vim" / "vim_random.pth"
TINY = {
    "d_model": 16,
    "n_layers": 1,
    "image_size": 20,
    "patch_size": 4,
    "n_classes": 3,
    "pattern": "vim",
    "norm": "rms",
    "norm_eps": 1e-5,
    "class_token": "middle",
}


@functools.cache
def published(name):
    return zoo.from_pretrained(PUBLISHED / name)


def arrays(place):
    return {key: tensor.read() for key, tensor in open_weights(place).items()}


def assert_same_models(model, other):
    assert model.config == other.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


def images():
    k = np.arange(2 * 3 * 224 * 224)
    values = (7 * k * k + 31 * (k // 224)) % 251 / 125 - 1
    return values.astype(np.float32).reshape(2, 3, 224, 224).transpose(0, 2, 3, 1)


def published_shapes(d, side, n_layers=24):
    """Of the tensors in hustvl/Vim's checkpoints."""
    e, n, r = 2 * d, 16, d // 16
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, side**2 + 1, d), "norm_f.weight": (d,)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    shapes |= {"head.weight": (1000, d), "head.bias": (1000,)}
    for i in range(n_layers):
        mixer = {"in_proj.weight": (2 * e, d), "out_proj.weight": (d, e)}
        for b in ("", "_b"):
            mixer |= {f"A{b}_log": (e, n), f"D{b}": (e,), f"conv1d{b}.weight": (e, 1, 4), f"conv1d{b}.bias": (e,)}
            mixer |= {f"x_proj{b}.weight": (r + 2 * n, e), f"dt_proj{b}.weight": (e, r), f"dt_proj{b}.bias": (e,)}
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"layers.{i}.norm.weight"] = (d,)
    return shapes


@pytest.mark.parametrize("name", NAMES)
def test_gives_the_numbers_of_its_formulas(name):
    model = published(name)
    call, params = jitted(model)
    expected = np.load(PUBLISHED / name / "logits.npy")
    assert expected.std() > 1
    np.testing.assert_allclose(call(params, images()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "stride", "grid"), [("vim", 16, 14), ("vim_stride8", 8, 27)])
def test_sizes_are_those_of_the_tensors(name, stride, grid):
    config = published(name).config
    assert (config.stride, config.grid) == (stride, (grid, grid))
    assert (config.d_model, config.n_layers, config.n_classes, config.image_size) == (8, 2, 3, 224)
    assert config.vim == MambaConfig(d_state=4, dt_rank=3)


@pytest.mark.parametrize(
    ("preset", "side", "stride"),
    [
        ("vim-tiny", 14, None),
        ("vim-small", 14, None),
        ("vim-base", 14, None),
        ("vim-tiny", 27, 8),
        ("vim-small", 27, 8),
    ],
)
def test_presets_are_the_published_models(preset, side, stride):
    shapes = published_shapes(zoo.presets[preset].d_model, side)
    config = vim_layout.read_config({"model_type": "vim"}, shapes)
    assert dataclasses.replace(config, drop_path=0.1) == dataclasses.replace(zoo.presets[preset], patch_stride=stride)


def test_tensors_are_those_of_the_published_files():
    shapes = published_shapes(192, 14, n_layers=1)
    config = dataclasses.replace(zoo.presets["vim-tiny"], n_layers=1)
    model = nnx.eval_shape(lambda: zoo.ImageClassifier(config, rngs=nnx.Rngs(0)))
    params = {path: param.shape for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    entries = vim_layout.tensor_table(model).entries
    assert {name: entry.shape([params[path] for path in entry.paths]) for name, entry in entries.items()} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_goes_out_as_it_came_in(name, tmp_path):
    model = published(name)
    zoo.save_pretrained(model, tmp_path, "official")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "config.json"]
    theirs, ours = arrays(PUBLISHED / name), arrays(tmp_path)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    assert_same_models(zoo.from_pretrained(tmp_path), model)
    (tmp_path / "config.json").unlink()
    back = zoo.from_pretrained(tmp_path)
    assert_same_models(back, model)
    zoo.save_pretrained(back, tmp_path, "official")  # over itself
    assert arrays(tmp_path).keys() == theirs.keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_stride": 2, "norm_eps": 1e-6, "channels": 1},
        {"image_size": 4, "n_classes": 0},
        {"vim": MambaConfig(d_state=3, d_conv=2, expand=1.5, dt_rank=5)},
        {"param_dtype": "bfloat16", "dtype": "bfloat16"},
    ],
)
def test_a_config_says_what_the_tensors_do_not(fields, tmp_path):
    model = zoo.ImageClassifier(zoo.ImageClassifierConfig(**TINY | fields), rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, tmp_path, "official")
    back = zoo.from_pretrained(tmp_path)
    assert_same_models(back, model)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.pop("stride") == back.config.stride
    (tmp_path / "config.json").write_text(json.dumps(raw))  # the stride follows from the size
    assert zoo.from_pretrained(tmp_path / "checkpoint.pth").config == model.config


def test_a_grid_that_224_pixels_do_not_give_needs_a_config(tmp_path):
    zoo.save_pretrained(zoo.ImageClassifier(zoo.ImageClassifierConfig(**TINY), rngs=nnx.Rngs(0)), tmp_path, "official")
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ValueError, match="grid of 5 x 5, which patches of 4 pixels do not give in images of 224: say im"
    ):
        zoo.from_pretrained(tmp_path)


def test_extra_fields_change_no_model(tmp_path):
    model = published("vim")
    zoo.save_pretrained(model, tmp_path, "official", extra={"license": "apache-2.0"})
    assert json.loads((tmp_path / "config.json").read_text())["license"] == "apache-2.0"
    with pytest.raises(ValueError, match=r"extra=.* describes another model"):
        zoo.save_pretrained(model, tmp_path, "official", extra={"norm_eps": 1e-3})


def test_one_of_several_files_is_asked_for_by_name(tmp_path):
    for name in NAMES:
        shutil.copy(PUBLISHED / name / f"{name}_random.pth", tmp_path)
    with pytest.raises(ValueError, match=r"holds vim_random\.pth, vim_stride8_random\.pth: name the one to read"):
        zoo.from_pretrained(tmp_path)
    for name in NAMES:
        assert_same_models(zoo.from_pretrained(tmp_path / f"{name}_random.pth"), published(name))
    with pytest.raises(FileNotFoundError, match=r"another\.pth is neither a folder nor a name on the hub"):
        zoo.from_pretrained(tmp_path / "another.pth")


def test_a_file_on_the_hub_is_downloaded_alone(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, [pattern for pattern in allow_patterns if "pth" in pattern]))
        shutil.copy(FILE, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = zoo.from_pretrained("owner/some.name/vim_random.pth")
    assert asked == [("owner/some.name", ["vim_random.pth"])]
    assert_same_models(model, published("vim"))
    with pytest.raises(FileNotFoundError, match=r"holds no another\.pth"):
        zoo.from_pretrained("owner/some.name/another.pth")


def change(tensors, edits):
    """Tensors without those that an edit is None for, with those of other edits' shapes."""
    made = {name: np.zeros(shape, np.float32) for name, shape in edits.items() if shape}
    return {name: tensor for name, tensor in tensors.items() if name not in edits} | made


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"layers.1.mixer.D_b": None}, "1 missing in the file: layers.1.mixer.D_b$"),
        ({"layers.0.mixer.conv1d_b.bias": None}, "1 missing in the file: layers.0.mixer.conv1d_b.bias$"),
        ({"layers.0.mixer.A_log": None}, "no tensor layers.0.mixer.A_log"),
        ({"head.bias": None, "norm_f.weight": None}, "2 missing in the file: head.bias, norm_f.weight"),
        ({"layers.0.norm.bias": (8,)}, "1 in the file that the model does not have: layers.0.norm.bias"),
        ({"layers.2.mixer.D_b": (16,)}, "16 missing in the file: layers.2.mixer.A_b_log, "),
        ({"layers.1.mixer.A_b_log": (16, 5)}, r"layers.1.mixer.A_b_log is \(16, 5\), expected \(16, 4\)"),
        (
            {"layers.0.mixer.dt_proj.weight": (16, 2)},
            r"7 of another shape: .*x_proj.weight is \(11, 16\), expected \(10",
        ),
        ({"cls_token": (1, 2, 8)}, r"cls_token is \(1, 2, 8\), expected \(1, 1, 8\)"),
        ({"layers.0.mixer.A_log": (16, 4, 1)}, r"layers.0.mixer.A_log is \(16, 4, 1\), expected 2 axes"),
        (
            {"pos_embed": (1, 196, 8)},
            "pos_embed has 196 places, expected those of a square and one for the class token",
        ),
        ({"patch_embed.proj.weight": (8, 3, 16, 8)}, "has patches of 16 x 8, expected squares"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(edits, message, tmp_path):
    save_weights(tmp_path, change(arrays(FILE), edits), format="pth")
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"image_size": 448}, "config.json: pos_embed has a grid of 14 x 14, .* in images of 448"),
        ({"stride": 8}, r"1 of another shape: pos_embed is \(1, 197, 8\), expected \(1, 730, 8\)"),
        ({"stride": 15}, "multiple of 15 more"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(raw, message, tmp_path):
    shutil.copy(FILE, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vim"} | raw))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


V2 = ("A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias")


def without(*names):
    return {f"layers.{i}.mixer.{name}": None for i in range(2) for name in names}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (without(*V2), "bimamba_type 'none' is not supported, only 'v2'"),
        (without(*V2[1:]), "bimamba_type 'v1' is not supported, only 'v2'"),
        (
            {"cls_token": None, "cls_token_head": (1, 1, 8), "cls_token_tail": (1, 1, 8), "pos_embed": (1, 198, 8)},
            "cls_token_head: class tokens at both ends are not supported",
        ),
        ({"cls_token": None, "pos_embed": (1, 196, 8)}, "no tensor cls_token: models without it are not supported"),
        ({"pos_embed": None}, "no tensor pos_embed: models without it are not supported"),
        (
            {"rope.freqs_cos": (196, 8), "rope.freqs_sin": (196, 8)},
            "rope.freqs_cos: rotary positions are not supported",
        ),
        ({"layers.0.mixer.gamma": (8,)}, "layers.0.mixer.gamma: layer scale is not supported"),
        ({"patch_embed.proj.weight": None}, "no tensor patch_embed.proj.weight: these are not the weights of Vision M"),
    ],
)
def test_another_kind_of_vision_mamba_is_refused(edits, message, tmp_path):
    save_weights(tmp_path, change(arrays(FILE), edits), format="pth")
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "attn/mlp"}, "pattern='attn/mlp' has no official layout for images, only vim has one"),
        ({"pattern": "vim/mlp"}, "pattern='vim/mlp' has no official layout"),
        ({"pattern": "vim[d_state=4]"}, "pattern=.* has no official layout"),
        ({"class_token": "first"}, "class_token='first' cannot be written in the layout of vim, only 'middle'"),
        ({"norm": "layer"}, "norm='layer' cannot be written"),
        ({"pool": "mean"}, "pool='mean' cannot be written"),
        ({"position": "none"}, "position='none' cannot be written"),
        ({"stem": "conv"}, "stem='conv' cannot be written"),
        ({"layer_scale": 0.1}, "layer_scale=0.1 cannot be written"),
        ({"residual_in_fp32": False}, "residual_in_fp32=False cannot be written"),
        ({"vim": MambaConfig(bias=True)}, "vim.bias=True cannot be written"),
        ({"vim": MambaConfig(conv_bias=False)}, "vim.conv_bias=False cannot be written"),
    ],
)
def test_what_the_layout_has_no_word_for_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        vim_layout.write_config(zoo.ImageClassifierConfig(**TINY | fields))


def test_transformers_has_no_vision_mamba(tmp_path, unchecked):
    model = zoo.ImageClassifier(zoo.ImageClassifierConfig(**TINY), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="pattern='vim' has no transformers layout for images, only attn/mlp has one"):
        zoo.save_pretrained(model, tmp_path, "transformers")
    with pytest.raises(ValueError, match="unknown layout 'transformer', did you mean 'transformers'"):
        zoo.save_pretrained(model, tmp_path, "transformer")


def test_weights_that_would_be_read_instead_are_not_joined(tmp_path):
    model = published("vim")
    for name in ("pytorch_model.bin", "another.pth"):
        (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match=f"{name} exists and would be read instead of checkpoint.pth"):
            zoo.save_pretrained(model, tmp_path, "official")
        (tmp_path / name).unlink()


def test_what_is_dropped_in_training_needs_no_word(tmp_path):
    config = zoo.ImageClassifierConfig(**TINY, drop_path=0.2, remat=True)
    zoo.save_pretrained(zoo.ImageClassifier(config, rngs=nnx.Rngs(0)), tmp_path, "official")
    assert dataclasses.replace(zoo.from_pretrained(tmp_path).config, drop_path=0.2, remat=True) == config


def test_torch_reads_what_is_saved(tmp_path):
    torch = pytest.importorskip("torch")
    zoo.save_pretrained(published("vim"), tmp_path, "official")
    whole = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert list(whole) == ["model"]
    for name, value in arrays(FILE).items():
        np.testing.assert_array_equal(whole["model"][name].numpy(), value, err_msg=name)
