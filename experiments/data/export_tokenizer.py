"""A tokenizer as others load it: the files from which AutoTokenizer of transformers gives the same ids.

tokenizer.json alone is not enough: which tokens open, close, hide and fill a row stands in tokenizer_config.json and
special_tokens_map.json, and rows of an encoder get theirs from a post-processor. A tokenizer of bytes becomes a
byte-level BPE without merges.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers as hf

from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizer_files import CONFIG_FILE, FILE_NAME, SPECIAL_FILE, Frame, bert_options, read_frame
from experiments.data.tokenizers import EOT, ByteTokenizer, Tokenizer

GENERATION_FILE = "generation_config.json"
# What tokens get as names that the tokenizer lacks and rows of an encoder have all the same.
_NEW = {"cls": "[CLS]", "mask": "[MASK]", "pad": "[PAD]"}


Rows = Literal["encoder", "documents", "chats", "plain"]


def export_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, rows: Rows, max_length: int | None = None, token_types: bool = False
) -> None:
    """Writes the files of a tokenizer; those that are in the folder already stay.

    Args:
      tokenizer: of a run, or of a published model.
      rows: of an encoder, with its special tokens around them; of documents that begin and end with eot, as runs of
        causal models read them, without any; of chats, the same with special tokens called as the tokenizer calls
        them, as its chat template does; or as the tokenizer has them.
      max_length: most tokens of a row, where the model has a longest.
      token_types: whether the model tells the two texts of a pair apart.

    Raises:
      ValueError: ids that the library numbers otherwise.
    """
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    hf_tokenizer = byte_level_bpe() if is_bytes else hf.Tokenizer.from_str(tokenizer.to_json())
    make_roles: dict[Rows, Callable[[Tokenizer, hf.Tokenizer], dict[str, str]]] = {
        "encoder": _encoder_roles,
        "documents": _document_roles,
        "chats": lambda *both: _document_roles(*both) | _declared(tokenizer),
        "plain": _plain_roles,
    }
    roles = make_roles[rows](tokenizer, hf_tokenizer)
    lengths = [max_length, None if tokenizer.declared is None else tokenizer.declared.max_length]
    length = min((one for one in lengths if one is not None), default=None)
    said: dict[str, Any] = _kind(hf_tokenizer, roles) | roles
    said |= {} if length is None else {"model_max_length": length}
    said |= {"model_input_names": ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]}
    said |= {"clean_up_tokenization_spaces": False}
    if not (folder / FILE_NAME).is_file():
        (folder / FILE_NAME).write_text(hf_tokenizer.to_str(), encoding="utf-8")
    _write(folder / CONFIG_FILE, said)
    _write(folder / SPECIAL_FILE, roles)


def export_generation(tokenizer: Tokenizer, folder: Path, ends: Sequence[int] = ()) -> None:
    """Writes the ids that begin, end and fill up what a causal model generates, unless that is written already.

    They are those of the config.json and the tokenizer_config.json that are in the folder, or else eot.

    Args:
      ends: ids that end a text besides.
    """
    config, said = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", CONFIG_FILE))
    vocabulary, ids = tokenizer.vocabulary(), {}
    for role in ("bos_token", "eos_token", "pad_token"):
        named = vocabulary.get(said[role], tokenizer.eot) if isinstance(said.get(role), str) else tokenizer.eot
        ids[f"{role}_id"] = named if config.get(f"{role}_id") is None else config[f"{role}_id"]
    if others := [i for i in dict.fromkeys(ends) if i != ids["eos_token_id"]]:
        ids["eos_token_id"] = [ids["eos_token_id"], *others]
    _write(folder / GENERATION_FILE, ids)


def byte_level_bpe() -> hf.Tokenizer:
    """`ByteTokenizer` as a byte-level BPE without merges: ids 0 to 255 are bytes, 256 is eot."""
    # GPT-2's letters for bytes: printable ones stand for themselves, the others are U+0100 and up, in their order.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = {byte: 0x100 + i for i, byte in enumerate(b for b in range(256) if b not in shown)}
    letters = {chr(hidden.get(byte, byte)): byte for byte in range(256)}
    tokenizer = hf.Tokenizer(hf.models.BPE(letters, []))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def _declared(tokenizer: Tokenizer) -> dict[str, str]:
    return {} if tokenizer.declared is None else dict(tokenizer.declared.roles)


def _plain_roles(tokenizer: Tokenizer, hf_tokenizer: hf.Tokenizer) -> dict[str, str]:
    return {"eos_token": _name(hf_tokenizer, tokenizer.eot)} | _declared(tokenizer)


def _document_roles(tokenizer: Tokenizer, hf_tokenizer: hf.Tokenizer) -> dict[str, str]:
    """eot is all there is; a prompt gets no other tokens than its own."""
    if read_frame(hf_tokenizer) is not None:
        hf_tokenizer.post_processor = None
    eot = _name(hf_tokenizer, tokenizer.eot)
    hf_tokenizer.add_special_tokens([eot])
    return {"pad_token": eot} | _declared(tokenizer) | {"bos_token": eot, "eos_token": eot}


def _encoder_roles(tokenizer: Tokenizer, hf_tokenizer: hf.Tokenizer) -> dict[str, str]:
    """The tokens of an encoder's rows, which also get into its post-processor."""
    special = special_tokens(tokenizer)
    ids = {"cls": special.cls, "mask": special.mask, "pad": special.pad}
    for role, i in sorted(ids.items(), key=lambda item: item[1]):
        name = hf_tokenizer.id_to_token(i) or _NEW[role]
        hf_tokenizer.add_special_tokens([name])
        if hf_tokenizer.token_to_id(name) != i:
            raise ValueError(f"{name} is {i} in the model and {hf_tokenizer.token_to_id(name)} in {FILE_NAME}")
    hf_tokenizer.add_special_tokens([_name(hf_tokenizer, special.sep)])
    if read_frame(hf_tokenizer) != special.frame:
        hf_tokenizer.post_processor = _post_processor(special.frame, hf_tokenizer)
    ids |= {"sep": special.sep} | ({} if special.unknown is None else {"unk": special.unknown})
    return {f"{role}_token": _name(hf_tokenizer, i) for role, i in ids.items()} | _declared(tokenizer)


def _name(tokenizer: hf.Tokenizer, i: int) -> str:
    if (name := tokenizer.id_to_token(i)) is None:
        raise ValueError(f"the tokenizer has no token {i}")
    return name


def _post_processor(frame: Frame, tokenizer: hf.Tokenizer) -> Any:
    def pieces(ids, kind=0):
        return [f"{_name(tokenizer, i)}:{kind}" for i in ids]

    opening, between, closing, second = frame
    ids = dict.fromkeys((*opening, *between, *closing))
    return hf.processors.TemplateProcessing(
        single=[*pieces(opening), "$A:0", *pieces(closing)],
        pair=[*pieces(opening), "$A:0", *pieces(between), f"$B:{second}", *pieces(closing, second)],
        special_tokens=[(_name(tokenizer, i), i) for i in ids],
    )


def _kind(tokenizer: hf.Tokenizer, roles: Mapping[str, str]) -> dict[str, Any]:
    """The class that makes this tokenizer of its files: BERT's, or the one that takes them as they are."""
    options = bert_options(tokenizer)
    cls, sep = (tokenizer.token_to_id(roles.get(role, "")) for role in ("cls_token", "sep_token"))
    if options is None or cls is None or sep is None or read_frame(tokenizer) != Frame((cls,), (sep,), (sep,), 1):
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer_class": "BertTokenizer"} | options


def _write(path: Path, content: Any) -> None:
    if not path.is_file():
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
