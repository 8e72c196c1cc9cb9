"""A tokenizer of others neither ends the process nor fills its memory."""

import json

import pytest
import tokenizers as hf

from experiments.data.tokenizers import load_tokenizer, published_tokenizer

VOCABULARY = {"[UNK]": 0, "a": 1, "[CLS]": 2, "[SEP]": 3}


def write(folder, **parts):
    """A tokenizer.json with some parts changed."""
    folder.mkdir()
    raw = json.loads(hf.Tokenizer(hf.models.WordPiece(VOCABULARY, unk_token="[UNK]")).to_str())
    (folder / "tokenizer.json").write_text(json.dumps(raw | parts))
    return folder


def replace(content, *, kind="String", pattern="a"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def several(name, steps):
    return {"type": "Sequence", name: steps}


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        ({"normalizer": several("normalizers", [replace("aa")] * 40)}, "normalizer could make 1.1e\\+12"),
        ({"normalizer": several("normalizers", [several("normalizers", [replace("a" * 32)] * 2)])}, "normalizer"),
        ({"normalizer": several("normalizers", [replace("a" * 2000, kind="Regex", pattern=".")])}, "normalizer"),
        ({"decoder": several("decoders", [replace("aa")] * 40)}, "decoder"),
    ],
)
def test_steps_that_make_much_of_little_are_refused(parts, part, tmp_path):
    folder = write(tmp_path / "tokenizer", **parts)
    for load in (published_tokenizer, lambda folder: load_tokenizer(str(folder), [], 0)):
        with pytest.raises(ValueError, match=f"the tokenizer's {part}.*expected at most 1,000"):
            load(folder)


def test_what_published_tokenizers_do_is_no_growth(tmp_path):
    llama = [{"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", pattern=" ")]
    t5 = [replace(" ", kind="Regex", pattern=" {2,}"), replace('"', pattern="``"), replace("\u2581", pattern=" ")]
    for i, steps in enumerate((llama, t5)):
        assert load_tokenizer(str(write(tmp_path / str(i), normalizer=several("normalizers", steps))), [], 0)


def test_a_vocabulary_without_what_is_unknown_is_one_line(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ValueError, match=r"the tokenizer fails on a text: WordPiece error: Missing \[UNK\] token"):
        published_tokenizer(tmp_path).encode("b")


def test_an_expression_without_an_end_is_one_line(tmp_path):
    folder = write(tmp_path / "tokenizer", normalizer=replace("x", kind="Regex", pattern="(a+)+$"))
    tokenizer = load_tokenizer(str(folder), [], 0)
    with pytest.raises(ValueError, match="the tokenizer fails on a text: Onig: Regex search error"):
        tokenizer.encode("a" * 40 + "b")
