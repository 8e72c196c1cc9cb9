"""Readers of foreign files, fed with what nobody would write: one line or the right thing, never another exception.

Hypothesis changes sound files a little, which reaches deeper than noise does. The draws are always the same; a few
seconds here, ten minutes under `slow`.
"""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest

import zoo
from experiments.data.array_files import read_arrays
from experiments.data.gguf_model import convert_llama
from experiments.data.tokenizers import published_tokenizer
from tests.zoo.published.hostile_files import LLAMA, M2, MAMBA, NATIVE, op, safetensors, tensor, zipped
from zoo.published.inert_pickle import Inert, read_pickle
from zoo.published.weight_files import open_weights

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

HEADER = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate("xy")}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    | {"max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}},
}
HYBRIDS = ("jamba", "bamba", "zamba2", "falcon_h1", "granitemoehybrid")
CONFIGS = [MAMBA, LLAMA, M2, {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*E"}]
CONFIGS += [{"model_type": kind, "num_hidden_layers": 2} for kind in (*HYBRIDS, "bert", "modernbert", "vit")]
CONFIGS += [{"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2"}}, {"dim": 8, "n_layers": 1}]
CONFIGS.append(NATIVE | {"config": {"d_model": 8, "n_layers": 1, "pattern": "mamba"}})


def arrays():
    file = io.BytesIO()
    np.savez(file, images=np.zeros((2, 2, 2), np.uint8), labels=np.zeros(2, int))
    return file.getvalue()


PICKLE = b"\x80\x02}(" + op("x") + tensor((2, 2), (2, 1), 4) + op("y") + op([1, (2, 3), {"z": None}]) + b"u."
SOUND = {
    "safetensors": safetensors(HEADER),
    "bin": zipped({"a/data.pkl": PICKLE, "a/data/0": bytes(16)}),
    "npz": arrays(),
    "gguf": b"GGUF\x03\0\0\0" + (1).to_bytes(8, "little") * 2 + (4).to_bytes(8, "little") + b"name" + bytes(60),
    "pickle": PICKLE,
    "tokenizer": json.dumps(TOKENIZER).encode(),
}


@st.composite
def damaged(draw, sound):
    """Bytes that were some others before a few changes: numbers, cuts, repeats."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                size = draw(st.sampled_from((4, 8)))
                value = draw(st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
                content[at : at + size] = value.to_bytes(size, "little")
            case 2:
                del content[at : at + draw(st.integers(1, 20))]
            case 3:
                content[at:at] = content[at : at + draw(st.integers(1, 20))]
    return bytes(content)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((0, -1, 1, 3, 8, 2**31, 10**12, 0.5, 1e308, float("inf"), float("nan"), "", "x", "8", "mamba*9")),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(("layer", "rope_type", "factor", "d_state")), st.integers(-1, 9), max_size=2),
)
OTHERS = """num_key_value_heads head_dim intermediate_size hidden_act rope_scaling rope_parameters layer_types expand
mamba_expand time_step_limit ssm_cfg attn_layer_idx attn_cfg layers_block_type num_experts tie_word_embeddings
attn_layer_period num_local_experts logits_scaling patch_size image_size"""
FIELDS = sorted({field for config in CONFIGS for field in config} | {*OTHERS.split()})


@contextlib.contextmanager
def one_line():
    """Nothing but an error of one line may come."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error).strip()  # noqa: PT017, most of what is tried goes well or fails


def check_bytes(kind, content, folder):
    if kind == "pickle":
        with contextlib.suppress(ValueError, LookupError, TypeError, pickle.UnpicklingError):
            read_pickle(content, call=lambda name, args: Inert(name), persistent=lambda pid: None)
        return
    names = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "tokenizer": "tokenizer.json"}
    path = folder / names.get(kind, f"a.{kind}")
    path.write_bytes(content)
    with one_line():
        if kind == "npz":
            read_arrays(path, ("images", "labels"))
        elif kind == "gguf":
            convert_llama(path, folder / "out")
        elif kind == "tokenizer":
            published_tokenizer(folder)
        else:
            for each in open_weights(path).values():
                each.read()


def check_config(raw, folder):
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").write_bytes(safetensors({}, b""))
    with one_line():
        zoo.from_pretrained(folder)


def configs():
    changes = st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=4)
    return st.builds(lambda config, change: config | change, st.sampled_from(CONFIGS), changes)


def fuzz(check, strategy, examples):
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(check))()


@pytest.mark.parametrize("examples", [60, pytest.param(8000, marks=pytest.mark.slow)], ids=["seconds", "minutes"])
@pytest.mark.parametrize("kind", SOUND)
def test_damaged_files_are_told_in_a_line(kind, examples, tmp_path):
    fuzz(lambda content: check_bytes(kind, content, tmp_path), damaged(SOUND[kind]), examples)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.slow)], ids=["seconds", "minutes"])
def test_odd_configs_are_told_in_a_line(examples, tmp_path, unchecked):
    fuzz(lambda raw: check_config(raw, tmp_path), configs(), examples)
