"""Encoders out of published folders, with the tokenizer that their files describe."""

import json

import pytest
from flax import nnx

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.encoders.encoder_inputs import encode
from experiments.encoders.load import load_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cafe", "The", "Café"]


def save_bert(folder, words=WORDS, **files):
    """A published BERT without a head, its vocabulary in vocab.txt."""
    config = {"d_model": 8, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": len(words), "max_len": 16}
    config |= {"norm_place": "post", "pad_vocab_multiple": 1, "first_norm": True}
    config |= {"attn": zoo.AttentionConfig(n_heads=1, position="none", bias=True)}
    config |= {"mlp": zoo.MLPConfig(d_ff=8, gated=False, activation="gelu", bias=True)}
    model = zoo.SequenceClassifier(zoo.SequenceClassifierConfig(**config, n_labels=0), rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, folder, layout="transformers")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("lower", "expected"), [(None, [2, 5, 6, 3]), (True, [2, 5, 6, 3]), (False, [2, 7, 8, 3])])
def test_a_cased_bert_of_a_vocab_txt_reads_its_case(lower, expected, tmp_path):
    said = {} if lower is None else {"tokenizer_config": {"do_lower_case": lower}}
    _, tokenizer, _ = load_encoder(save_bert(tmp_path / "bert", **said))
    assert encode(tokenizer, ["The Café"], max_len=16)[0].tokens.tolist() == expected


def test_rows_of_an_encoder_begin_and_end_as_its_tokenizer_says_without_new_ids(tmp_path):
    words = ["<pad>", "<unk>", "<bos>", "<eos>", "the"]
    said = {"cls_token": "<bos>", "sep_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    folder = save_bert(tmp_path / "bert", words, tokenizer_config=said | {"mask_token": "<unk>"})
    model, tokenizer, _ = load_encoder(folder)
    assert encode(tokenizer, ["the"], max_len=16)[0].tokens.tolist() == [2, 4, 3]
    assert special_tokens(tokenizer).vocab_size == len(words) == model.config.vocab_size


def test_what_the_model_has_no_row_for_is_refused(tmp_path):
    folder = save_bert(tmp_path / "bert", tokenizer_config={"cls_token": "<begin>"})
    with pytest.raises(ValueError, match="the tokenizer needs 10 ids, the model has 9 rows for them"):
        load_encoder(folder)
