import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers as hf

from experiments.data import tokenizers
from experiments.data.tokenizers import (
    ByteTokenizer,
    SubwordTokenizer,
    load_tokenizer,
    restore_tokenizer,
    save_tokenizer,
    train_bpe,
    train_wordpiece,
)

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n\treturn a * b\n" * 3,
    "Der Fluß fließt, 漢字 漢字 漢字 🙂🙂 naïve café\r\n" * 5,
    "",
    " leading, trailing and  double  spaces \n\n \n",
    "<|endoftext|> is text here, and so is </s>",
    "\x00\x01\x7f \u0301\u200d\ufeff\uffff\U0010ffff",
]


def random_text(seed: int, length: int = 400) -> str:
    """Text of any code points but surrogates, half of them ASCII."""
    draw = random.Random(seed)
    ranges = [(0, 0x7F), (0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(length))


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return train_bpe(TEXTS, 400)


def word_level(*words: str, **special) -> hf.Tokenizer:
    return hf.Tokenizer(hf.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


def test_byte_ids_are_the_bytes_of_utf8():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aé🙂")
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == "aé🙂".encode()
    assert (tokenizer.eot, tokenizer.vocab_size) == (256, 257)


@pytest.mark.parametrize("text", [*TEXTS, *map(random_text, range(20))], ids=range(26))
def test_any_unicode_round_trips(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.eot not in ids
        assert sum(map(len, tokenizer.encode_batch([text, "x", text]))) == 2 * len(ids) + 1


def test_lone_surrogates_are_encoded_somehow(bpe):
    escaped = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    assert bytes(ByteTokenizer().encode(escaped).tolist()) == b"caf\xe9"
    for text in (escaped, "\ud800x", "x\udfff"):
        for tokenizer in (ByteTokenizer(), bpe):
            assert len(tokenizer.encode(text)) >= 2
            assert "\ud800" not in tokenizer.decode(tokenizer.encode(text))
    train_bpe(["\ud800x"], 257)


def test_decode_skips_eot_and_ids_of_a_padded_vocabulary(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode("one two").tolist()
        eot = tokenizer.eot
        assert tokenizer.decode([eot, *ids[:2], eot, *ids[2:], tokenizer.vocab_size, 99999, eot]) == "one two"
        assert tokenizer.decode(np.array(ids, np.uint16)) == "one two"
        assert tokenizer.decode(iter(ids)) == "one two"
        assert tokenizer.decode([]) == ""
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_bpe_shortens_its_training_text_and_respects_vocab_size(bpe):
    assert bpe.kind == "bpe"
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    with pytest.raises(ValueError, match=r"vocab_size=256 must be at least 257"):
        train_bpe(TEXTS, 256)


def test_equal_texts_train_equal_tokenizers(bpe):
    assert train_bpe(iter(TEXTS), 400).to_json() == bpe.to_json()


def test_pieces_of_a_text_have_the_tokens_of_the_whole(bpe, monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE", 16)
    draw = random.Random(0)
    texts = TEXTS + ["".join(draw.choice("ab1_ \n\n\r\t.,'é漢\x1c\x85\u2028s") for _ in range(500)) for _ in range(40)]
    n_pieces = 0
    for text in texts:
        for tokenizer in (ByteTokenizer(), bpe):
            pieces = list(tokenizer.pieces(text))
            assert "".join(pieces) == text
            n_pieces += len(pieces)
            ids = [tokenizer.encode(piece) for piece in pieces]
            np.testing.assert_array_equal(np.concatenate([*ids, []]), tokenizer.encode(text))
    assert n_pieces > 20 * len(texts)


def test_tokenizer_without_seams_is_given_whole_texts(monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE", 4)
    model = word_level("?", "</s>", "a")
    model.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    assert list(SubwordTokenizer(model).pieces("a a a a a a")) == ["a a a a a a"]


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_eot_of_a_published_tokenizer_goes_by_many_names(name):
    tokenizer = SubwordTokenizer(word_level("?", "a", name))
    assert tokenizer.eot == 2
    assert tokenizer.decode([1, 2]) == "a"


def test_tokenizer_without_end_of_text_names_what_was_looked_for(tmp_path):
    path = tmp_path / "odd.json"
    word_level("?", "a").save(str(path))
    with pytest.raises(ValueError, match=r"odd\.json.*no end-of-text token; looked for <\|endoftext\|>, </s>, <eos>"):
        load_tokenizer(str(path))


def test_published_tokenizer_neither_cuts_nor_pads_nor_adds_tokens():
    model = word_level("?", "</s>", "a", "b")
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>"])
    model.post_processor = hf.processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    model.enable_truncation(3)
    model.enable_padding()
    long, short = SubwordTokenizer(model).encode_batch(["a b a b a b", "a"])
    assert long.tolist() == [2, 3, 2, 3, 2, 3]
    assert short.tolist() == [2]


def test_vocab_size_is_above_every_id_of_a_vocabulary_with_holes():
    model = hf.Tokenizer(hf.models.WordLevel({"?": 0, "</s>": 7}, unk_token="?"))
    assert SubwordTokenizer(model).vocab_size == 8


def test_saved_tokenizer_restores_as_it_was(bpe, tmp_path):
    for tokenizer in (ByteTokenizer(), bpe):
        tokenizer.save(tmp_path / tokenizer.kind)
        restored = restore_tokenizer(tmp_path / tokenizer.kind)
        assert type(restored) is type(tokenizer)
        assert (restored.kind, restored.vocab_size, restored.eot) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eot,
        )
        for text in TEXTS:
            np.testing.assert_array_equal(restored.encode(text), tokenizer.encode(text))
        assert [file.name for file in (tmp_path / tokenizer.kind).iterdir()] == ["tokenizer.json"]


def test_interrupted_save_keeps_the_old_file(bpe, tmp_path, monkeypatch):
    save_tokenizer(bpe, tmp_path)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_tokenizer(ByteTokenizer(), tmp_path)
    assert restore_tokenizer(tmp_path).kind == "bpe"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_or_damaged_file_is_one_clear_line(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json in"):
        restore_tokenizer(tmp_path)
    for content in ("", "{", "{}", '{"kind": "words"}', bpe.to_json()[:-200]):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json' is not a readable tokenizer\.json: ") as failure:
            restore_tokenizer(tmp_path)
        assert "\n" not in str(failure.value)


def test_spec_is_a_kind_a_file_or_a_folder(bpe, tmp_path):
    bpe.save(tmp_path)
    assert load_tokenizer("bytes").kind == "bytes"
    for spec in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        assert load_tokenizer(spec).to_json() == bpe.to_json()
    assert load_tokenizer("bpe", TEXTS, 400).to_json() == bpe.to_json()
    assert load_tokenizer("bpe", ["other"], 300, folder=tmp_path).to_json() == bpe.to_json()
    with pytest.raises(ValueError, match="trained on texts"):
        load_tokenizer("bpe")


@pytest.mark.parametrize("spec", ["no/such/path", "./x", "missing.json", "two words", ""])
def test_spec_that_is_nothing_names_the_alternatives(spec):
    with pytest.raises(ValueError, match=r"expected 'bytes', 'bpe', 'wordpiece', a tokenizer\.json, a") as failure:
        load_tokenizer(spec)
    assert f"'{spec}'" in str(failure.value)


def test_unreachable_hub_is_one_clear_line():
    with pytest.raises(
        ValueError, match=r"tokenizer 'nobody/nothing' cannot be loaded from the hub \(.*expected"
    ) as failure:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(failure.value)


def test_hub_name_reads_all_the_repositorys_files_of_a_tokenizer(bpe, tmp_path, monkeypatch):
    import huggingface_hub

    bpe.save(tmp_path)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "<|endoftext|>", "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    cached = set()

    def download(repository, file, local_files_only=False):
        if local_files_only and file not in cached:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not yet")
        cached.add(file)
        return str(tmp_path / file)

    files = ["README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repository, timeout: info)
    tokenizer = load_tokenizer("someone/model")
    assert tokenizer.to_json() == bpe.to_json()
    assert tokenizer.declared == ({"cls_token": "<|endoftext|>"}, 77)
    assert cached == {"tokenizer.json", "tokenizer_config.json"}

    def unreachable(self, repository, timeout):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert load_tokenizer("someone/model").declared == tokenizer.declared  # what is in the cache asks nobody
    cached.remove("tokenizer_config.json")
    assert load_tokenizer("someone/model").to_json() == bpe.to_json()


def test_bytes_file_says_so_in_json(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"kind": "bytes"}


def test_a_trained_wordpiece_is_uncased_and_has_berts_special_tokens():
    texts = ["The Foxes jumped, naïve foxes jumping. " * 20]
    tokenizer = train_wordpiece(texts, 300)
    vocabulary = tokenizer.vocabulary()
    assert [vocabulary[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert (tokenizer.kind, tokenizer.eot) == ("wordpiece", 3)
    np.testing.assert_array_equal(tokenizer.encode("NAIVE foxes"), tokenizer.encode("naïve Foxes"))
    assert tokenizer.decode(tokenizer.encode("The foxes, jumped.")) == "the foxes, jumped."
    assert train_wordpiece(texts, 300).to_json() == tokenizer.to_json()
    assert any(token.startswith("##") for token in vocabulary)
    assert 3 not in tokenizer.encode("[SEP]")  # text never turns into special tokens
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 257"):
        train_wordpiece(texts, 100)


def test_offsets_are_characters_of_the_text(bpe):
    text = "aé 🙂 b\n"
    ids, offsets = ByteTokenizer().encode_with_offsets(text)
    assert offsets.shape == (len(ids), 2)
    assert [text[a:b] for a, b in offsets[[0, 1, 2, 4, 7]]] == ["a", "é", "é", "🙂", "🙂"]
    ids, offsets = bpe.encode_with_offsets("return a + b")
    np.testing.assert_array_equal(ids, bpe.encode("return a + b"))
    assert "".join("return a + b"[a:b] for a, b in offsets) == "return a + b"
