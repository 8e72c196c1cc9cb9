"""Exported tokenizers give the ids that the model was trained on, in the library and in transformers."""

import json

import pytest
import tokenizers as hf

from experiments.data.export_tokenizer import byte_level_bpe, export_generation, export_tokenizer
from experiments.data.tokenizers import (
    ByteTokenizer,
    published_tokenizer,
    reads_alike,
    restore_tokenizer,
    save_tokenizer,
    train_bpe,
    train_wordpiece,
)
from experiments.encoders.encoder_inputs import encode

TEXTS = ["Grüße, 世界! \U0001f600 tab\tnew\nline\r\n  two  spaces ", "", "The naïve ﬁ ½ \x00 \x7f é", "the the The THE"]
MADE = {
    "bytes": ByteTokenizer(),
    "bpe": train_bpe(TEXTS * 5, 400),
    "wordpiece": train_wordpiece(TEXTS * 5, 300),
}
ALL = [(name, rows) for name in MADE for rows in ("documents", "encoder")]


def export(folder, name, rows, **options):
    folder.mkdir(exist_ok=True)
    model = {"encoder": "bert" if name == "wordpiece" else "modernbert", "documents": "mamba"}[rows]
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    export_tokenizer(MADE[name], folder, rows=rows, **options)
    if rows == "documents":
        export_generation(MADE[name], folder)
    return folder


def expected(name, rows):
    if rows == "documents":
        return [MADE[name].encode(text).tolist() for text in TEXTS]
    return [row.tokens.tolist() for row in encode(MADE[name], TEXTS, max_len=1000)]


def test_bytes_are_a_byte_level_bpe_with_the_same_ids():
    tokenizer, every = byte_level_bpe(), "".join(map(chr, range(0x250))) + "世界\U0001f600\U0010ffff"
    assert tokenizer.encode(every).ids == ByteTokenizer().encode(every).tolist()
    assert tokenizer.decode(tokenizer.encode(every).ids) == every
    assert tokenizer.token_to_id("<|endoftext|>") == ByteTokenizer.eot
    letters = {letter for letter, i in tokenizer.get_vocab().items() if i < 256}
    assert letters == set(hf.pre_tokenizers.ByteLevel.alphabet())


def test_bytes_read_alike_in_either_form(tmp_path):
    export_tokenizer(ByteTokenizer(), tmp_path, rows="documents")
    written = published_tokenizer(tmp_path)
    assert written.to_json() != ByteTokenizer().to_json()
    assert reads_alike(ByteTokenizer(), written)
    assert reads_alike(written, ByteTokenizer())
    assert not reads_alike(ByteTokenizer(), train_bpe(TEXTS, 257))
    assert not reads_alike(written, train_bpe(TEXTS, 260))


@pytest.mark.parametrize(("name", "rows"), ALL)
def test_an_exported_tokenizer_has_the_ids_of_the_one_it_was(name, rows, tmp_path):
    folder = export(tmp_path / "out", name, rows)
    exported = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [exported.encode(text).ids for text in TEXTS] == expected(name, rows)
    back = published_tokenizer(folder)
    if rows == "encoder":
        assert [row.tokens.tolist() for row in encode(back, TEXTS, max_len=1000)] == expected(name, rows)
        pair, same = (encode(one, TEXTS[:1], TEXTS[2:3], max_len=99)[0] for one in (back, MADE[name]))
        assert [*pair.tokens, *pair.token_types] == [*same.tokens, *same.token_types]
    else:
        assert [back.encode(text).tolist() for text in TEXTS] == expected(name, rows)
        assert [back.decode(back.encode(text)) for text in TEXTS] == [
            MADE[name].decode(MADE[name].encode(text)) for text in TEXTS
        ]
        assert back.eot == MADE[name].eot


@pytest.mark.parametrize(("name", "rows"), ALL)
def test_transformers_reads_the_same(name, rows, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = export(tmp_path / "out", name, rows, max_length=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == expected(name, rows)
    assert tokenizer.model_max_length == 64
    if rows == "documents":
        eot = MADE[name].eot
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (eot, eot, eot)
        decoded = [MADE[name].decode(MADE[name].encode(text)) for text in TEXTS]
        assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS] == decoded
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == eot
    else:
        pair = encode(MADE[name], TEXTS[:1], TEXTS[2:3], max_len=999)[0]
        given = tokenizer(TEXTS[0], TEXTS[2], return_token_type_ids=True)
        assert given["input_ids"] == pair.tokens.tolist()
        assert given["token_type_ids"] == pair.token_types.tolist()


def test_a_cased_wordpiece_says_so_in_its_class(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "café", "Café", "cafe"]
    (tmp_path / "published").mkdir()
    (tmp_path / "published/vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "published/tokenizer_config.json").write_text('{"do_lower_case": false}')
    save_tokenizer(published_tokenizer(tmp_path / "published"), tmp_path / "run")
    tokenizer = restore_tokenizer(tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_tokenizer(tokenizer, tmp_path / "out", rows="encoder", max_length=512, token_types=True)
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (said["tokenizer_class"], said["do_lower_case"], said["model_max_length"]) == ("BertTokenizer", False, 512)
    assert said["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    assert published_tokenizer(tmp_path / "out").encode("The Café").tolist() == [6, 8]


def test_what_is_in_the_folder_stays(tmp_path):
    folder = export(tmp_path / "out", "bpe", "documents")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    export(folder, "wordpiece", "documents")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
