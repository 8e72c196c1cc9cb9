"""What the files of a published tokenizer say: vocabulary, normalisation, special tokens, and what goes around a text.

A folder has a tokenizer.json, or a vocab.txt alone, as BERT's first releases do. Beside it, tokenizer_config.json,
special_tokens_map.json and added_tokens.json say more; what they say of a tokenizer of BERT's classes counts even where
tokenizer.json says otherwise, as it does in transformers. A tokenizer.json with nothing beside it is taken as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf

from zoo.published.json_files import parse_json

FILE_NAME = "tokenizer.json"
VOCABULARY = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
FILES = (FILE_NAME, VOCABULARY, CONFIG_FILE, SPECIAL_FILE, ADDED_FILE)
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
# BERT's WordPiece, under the names of the models that have the same.
BERT_CLASSES = ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "LayoutLM", "Lxmert", "RetriBert")
_PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")  # these say nothing of a vocab.txt
_BERT_ROLES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# What transformers writes where there is no longest text is 10^30.
_NO_LENGTH = 10**9


class Declared(NamedTuple):
    """What is said of a tokenizer besides how it cuts texts."""

    roles: Mapping[str, str]
    """Special tokens by what they are for: {"cls_token": "[CLS]"}."""
    max_length: int | None
    """Most tokens of a text, special ones included; None where nothing says so."""


class Frame(NamedTuple):
    """Ids that a post-processor puts around a text, or between and around two."""

    opening: tuple[int, ...]
    between: tuple[int, ...]
    closing: tuple[int, ...]
    second_type: int
    """Token type of a second text and what follows it; all before it have 0."""


def read_files(folder: Path) -> tuple[hf.Tokenizer, Declared]:
    """The tokenizer of a published folder.

    Raises:
      ValueError: there is none, a file of it cannot be read, or it is of a class that a vocab.txt cannot make.
    """
    said = _object(folder / CONFIG_FILE)
    name = _class_name(folder, said)
    bert = name in BERT_CLASSES
    if (folder / FILE_NAME).is_file():
        tokenizer = _read(folder / FILE_NAME)
        bert = bert and bool(said) and _description(tokenizer)["model"].get("type") == "WordPiece"
    elif (folder / VOCABULARY).is_file():
        if name and not bert and name not in _PLAIN_CLASSES:
            raise ValueError(
                f"{folder}: tokenizer_class={said.get('tokenizer_class')!r} with {VOCABULARY} alone is not supported, "
                f"only those of {', '.join(BERT_CLASSES)}; a {FILE_NAME} is, whatever its class"
            )
        vocabulary = hf.models.WordPiece.read_file(str(folder / VOCABULARY))  # lines end in "\n", and nowhere else
        tokenizer, bert = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token="[UNK]")), True
    else:
        raise ValueError(f"no {FILE_NAME} and no {VOCABULARY} in '{folder}'")
    try:
        special = {} if "added_tokens_decoder" in said else _object(folder / SPECIAL_FILE)
        marked = (_BERT_ROLES if bert else {}) | _some(said) | _some(special)
        roles = {role: _content(marked[role]) for role in ROLES if role in marked}
        if bert:
            _set_bert(tokenizer, said, roles)
        _add(tokenizer, folder, said, marked)
        if bert:
            _set_frame(tokenizer, roles)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {CONFIG_FILE} or {SPECIAL_FILE} is not understood: {error}") from error
    length = said.get("model_max_length")
    return tokenizer, Declared(roles, int(length) if length and length < _NO_LENGTH else None)


def read_frame(tokenizer: hf.Tokenizer) -> Frame | None:
    """What the tokenizer's post-processor puts around texts, None where that is nothing."""
    if tokenizer.post_processor is None:
        return None
    # Any text of one token shows it, and this tokenizer has no others.
    probe = hf.Tokenizer(hf.models.WordLevel({"a": 0}, unk_token="a"))
    probe.post_processor = tokenizer.post_processor
    (opening, closing), (_, between, after) = (_gaps(probe.encode(*texts)) for texts in (("a",), ("a", "a")))
    if not opening and not closing:
        return None
    if not between and not after:  # the post-processor knows single texts alone
        between = closing
    return Frame(opening, between, closing, max(probe.encode("a", "a").type_ids))


def bert_options(tokenizer: hf.Tokenizer) -> dict[str, Any] | None:
    """The options that BERT's classes make this very tokenizer of, None where they cannot."""
    said = _description(tokenizer)
    model, normalizer = said["model"], said["normalizer"] or {}
    plain = (
        model.get("type") == "WordPiece"
        and model["continuing_subword_prefix"] == "##"
        and model["max_input_chars_per_word"] == 100
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and said["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    )
    if not plain:
        return None
    return {
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


def _set_bert(tokenizer: hf.Tokenizer, said: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Makes a tokenizer normalise and cut words as the options say; what does so already stays as it is."""
    options = {
        "do_lower_case": said.get("do_lower_case", True),
        "strip_accents": said.get("strip_accents"),
        "tokenize_chinese_chars": said.get("tokenize_chinese_chars", True),
    }
    if bert_options(tokenizer) != options:
        tokenizer.normalizer = hf.normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=options["tokenize_chinese_chars"],
            strip_accents=options["strip_accents"],
            lowercase=options["do_lower_case"],
        )
        tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    if tokenizer.model.unk_token != roles["unk_token"]:
        tokenizer.model.unk_token = roles["unk_token"]
    if tokenizer.decoder is None:
        tokenizer.decoder = hf.decoders.WordPiece()


def _set_frame(tokenizer: hf.Tokenizer, roles: Mapping[str, str]) -> None:
    """[CLS] first [SEP] second [SEP], under the names that these have."""
    cls, sep = roles["cls_token"], roles["sep_token"]
    ids = {name: i for name in (cls, sep) if (i := tokenizer.token_to_id(name)) is not None}
    if read_frame(tokenizer) != Frame((ids[cls],), (ids[sep],), (ids[sep],), 1):
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=[f"{cls}:0", "$A:0", f"{sep}:0"],
            pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
            special_tokens=list(ids.items()),
        )


def _add(tokenizer: hf.Tokenizer, folder: Path, said: Mapping[str, Any], marked: Mapping[str, Any]) -> None:
    """Adds tokens that are not of the vocabulary, or special in it, in the order of their ids."""
    special = [_token(marked[role], special=True) for role in ROLES if role in marked]
    special += [_token(token, special=True) for name in _EXTRA for token in _listed(marked.get(name))]
    names = {token.content for token in special}
    numbered = {int(i): _token(token) for i, token in said.get("added_tokens_decoder", {}).items()}
    if "added_tokens_decoder" not in said:
        for name, i in _object(folder / ADDED_FILE).items():
            numbered[i] = hf.AddedToken(name, normalized=name not in names, special=name in names)
    there = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for i in sorted(numbered):
        if there.get(numbered[i].content) != repr(numbered[i]):
            tokenizer.add_tokens([numbered[i]])
    there |= {token.content: repr(token) for token in numbered.values()}
    for token in special:
        if token.content not in there:
            tokenizer.add_special_tokens([token])
            there[token.content] = repr(token)


def _gaps(encoding: hf.Encoding) -> list[tuple[int, ...]]:
    """The special ids before, between and behind the texts of a row."""
    gaps: list[list[int]] = [[]]
    for i, owner in zip(encoding.ids, encoding.sequence_ids, strict=True):
        if owner is None:
            gaps[-1].append(i)
        else:
            gaps.append([])
    return [tuple(gap) for gap in gaps]


def _class_name(folder: Path, said: Mapping[str, Any]) -> str:
    """The tokenizer's class, without what all of them end in: "Bert"; "" where nothing says it."""
    config = _object(folder / "config.json")
    name = said.get("tokenizer_class") or config.get("tokenizer_class")
    if not name:
        return "Bert" if config.get("model_type") == "bert" else ""
    name = str(name).removesuffix("Fast")
    return name if name in _PLAIN_CLASSES else name.removesuffix("Tokenizer")


def _some(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def _token(token: Any, *, special: bool = False) -> hf.AddedToken:
    """A token as the files have it: its text, or an object with how it is found in texts."""
    if isinstance(token, str):
        return hf.AddedToken(token, special=special)
    fields = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return hf.AddedToken(token["content"], special=special or token.get("special", False), **fields)


def _content(token: Any) -> str:
    return token if isinstance(token, str) else token["content"]


def _description(tokenizer: hf.Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds {type(content).__name__}, expected an object")
    return content


def _read(path: Path) -> hf.Tokenizer:
    try:
        return hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"'{path}' is not a readable tokenizer.json: {said}") from error
