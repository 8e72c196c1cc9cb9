"""Published tokenizers, read as transformers reads them, and what they put around texts.

published_tokenizers.json has small folders of them, and what `AutoTokenizer.from_pretrained(folder,
split_special_tokens=True)` of transformers 5.24.0 makes of some texts: `tokenizer(text)["input_ids"]`, ids and token
types of the first two texts as a pair, and the ids that fill up and hide. Each folder's vocabulary is `words`, in a
vocab.txt, or in a tokenizer.json where one is named.
"""

import json
from pathlib import Path

import pytest
import tokenizers as hf

from experiments.data.special_tokens import special_tokens, text_ids
from experiments.data.tokenizers import load_tokenizer, published_tokenizer, restore_tokenizer, save_tokenizer
from experiments.encoders.encoder_inputs import encode
from experiments.encoders.spans import windows

FACTS = json.loads((Path(__file__).parent / "published_tokenizers.json").read_text())
WORDS, FIRST, SECOND = FACTS["words"], *FACTS["texts"][:2]


def wordpiece_json(words, lowercase, post_processor):
    """A tokenizer.json of BERT's kind."""
    found = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [i for i, word in enumerate(words) if i < 5 or word == "<|endoftext|>"]
    options = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": lowercase}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i]} | found for i in special],
        "normalizer": {"type": "BertNormalizer"} | options,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": post_processor,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": model | {"max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(words)}},
    }


def write(folder, files):
    """A published folder's files of a tokenizer."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if name == "tokenizer.json" and "lowercase" in content:
            content = wordpiece_json(WORDS + content["more"], content["lowercase"], content["post_processor"])
        (folder / name).write_text(json.dumps(content))
    if "tokenizer.json" not in files:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


def folder_of(tmp_path, name):
    return write(tmp_path / "published", FACTS["folders"][name]["files"])


def rows(tokenizer, texts=FACTS["texts"]):
    return [row.tokens.tolist() for row in encode(tokenizer, texts, max_len=200)]


@pytest.mark.parametrize("name", FACTS["folders"])
def test_a_published_tokenizer_is_read_as_transformers_reads_it(name, tmp_path):
    expected = FACTS["folders"][name]
    tokenizer = published_tokenizer(folder_of(tmp_path, name))
    assert rows(tokenizer) == expected["rows"]
    pair = encode(tokenizer, [FIRST], [SECOND], max_len=200)[0]
    assert [pair.tokens.tolist(), pair.token_types.tolist()] == expected["pair"]
    special = special_tokens(tokenizer)
    for role in ("mask", "pad"):  # where nothing says which, by the usual names
        assert expected[role] in (None, getattr(special, role))
    assert special.vocab_size == tokenizer.vocab_size  # nothing is invented
    assert tokenizer.declared.max_length == expected["max_length"]
    # As a run keeps it.
    save_tokenizer(tokenizer, tmp_path / "run")
    restored = restore_tokenizer(tmp_path / "run")
    assert rows(restored) == expected["rows"]
    assert special_tokens(restored) == special
    assert restored.declared == tokenizer.declared
    assert load_tokenizer(str(tmp_path / "published")).to_json() == tokenizer.to_json()


def test_a_line_of_vocab_txt_ends_at_its_newline_alone(tmp_path):
    tokenizer = published_tokenizer(folder_of(tmp_path, "plain"))
    place = WORDS.index("a\u2028b")
    assert tokenizer.vocabulary()["a\u2028b"] == place
    assert tokenizer.encode("after").tolist() == [place + 1]


@pytest.mark.parametrize("name", ["json-lower-config-cased", "json-cased-generic", "modernbert"])
def test_a_tokenizer_json_that_says_all_already_stays_as_it_is(name, tmp_path):
    files = FACTS["folders"][name]["files"]
    folder = folder_of(tmp_path, name)
    if name == "json-lower-config-cased":
        write(folder, {"tokenizer_config.json": files["tokenizer_config.json"] | {"do_lower_case": True}})
    assert published_tokenizer(folder).to_json() == hf.Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()


def test_a_tokenizer_json_alone_is_taken_as_it_is(tmp_path):
    files = FACTS["folders"]["json-cased-config-silent"]["files"]
    folder = write(tmp_path / "published", {"tokenizer.json": files["tokenizer.json"]})
    assert published_tokenizer(folder).encode("The Café").tolist() == [WORDS.index("The"), WORDS.index("Café")]


def test_windows_tags_and_streams_have_the_tokenizers_own_special_tokens(tmp_path):
    tokenizer = published_tokenizer(folder_of(tmp_path, "roberta"))  # two tokens between a question and its context
    start, end = WORDS.index("<s>"), WORDS.index("</s>")
    window = windows(tokenizer, ["the"], ["new york x"], [{"text": ["york"], "answer_start": [4]}], max_len=12)[0]
    the, *context = (WORDS.index(word) for word in ("the", "new", "york", "x"))
    assert window.row.tokens.tolist() == [start, the, end, end, *context, end]
    assert window.span == (5, 5)
    assert window.offsets[5].tolist() == [4, 8]
    assert window.allowed.tolist() == [True, False, False, False, True, True, True, False]
    last = published_tokenizer(write(tmp_path / "last", FACTS["folders"]["ends-alone"]["files"]))
    special = special_tokens(last)
    assert special.row([7, 8]).tolist() == [7, 8, start]
    assert special.around == 1
    assert encode(last, ["the the the"], max_len=3)[0].tokens.tolist() == [the, the, start]
    assert not set(text_ids(last).tolist()) & special.all


def test_roles_name_the_special_tokens_where_there_is_no_post_processor(tmp_path):
    model = hf.Tokenizer(hf.models.WordLevel({word: i for i, word in enumerate(["a", "<bos>", "<eos>", "<fill>"])}))
    said = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<fill>"}
    folder = write(tmp_path / "published", {"special_tokens_map.json": said})
    model.save(str(folder / "tokenizer.json"))
    special = special_tokens(published_tokenizer(folder))
    assert special[:5] == (1, 2, 4, 3, 5)  # [MASK] alone is new
    assert special.row([0]).tolist() == [1, 0, 2]


def test_a_run_of_before_keeps_its_special_tokens_by_their_names(tmp_path):
    folder = folder_of(tmp_path, "modernbert")
    (folder / "tokenizer_config.json").unlink()  # these runs have none
    assert special_tokens(restore_tokenizer(folder)).sep == len(WORDS)  # <|endoftext|>
    assert special_tokens(published_tokenizer(folder)).sep == WORDS.index("[SEP]")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "tokenizer_class='BertJapaneseTok"),
        ({"tokenizer_config.json": []}, "holds list, expected an object"),
        ({"tokenizer_config.json": {"cls_token": 5}}, "tokenizer_config.json or special_tokens_map.json is not under"),
        ({"tokenizer.json": {}}, "is not a readable tokenizer.json"),
    ],
)
def test_what_cannot_be_read_is_named(files, message, tmp_path):
    with pytest.raises(ValueError, match="published.*" + message.replace("[", r"\[")):
        published_tokenizer(write(tmp_path / "published", files))


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no vocab\.txt in"):
        published_tokenizer(tmp_path)
