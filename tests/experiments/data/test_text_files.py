"""Every compression and encoding of text, and what damaged files are told as."""

import bz2
import gzip
import lzma

import pytest

from experiments.data.text_files import BadFile, check_encoding, open_text, read_bytes, read_text, stem_and_suffix
from tests.experiments.data.texts import compress

TEXT = "naïve café, line one\r\nline two\n" * 40
RUSSIAN = "Привет мир, это простой русский текст. " * 5
JAPANESE = "これは日本語の文章です。今日は天気がいい。" * 3


def lines(path, encoding="utf-8"):
    with open_text(path, path.name, encoding) as file:
        return file.read()


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_every_compression_and_encoding_holds_the_same_text(suffix, encoding, tmp_path):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(TEXT.encode(encoding), suffix))
    asked = "cp1252" if encoding == "cp1252" else "utf-8"
    assert read_text(path, "a", asked) == TEXT
    assert lines(path, asked) == TEXT
    assert stem_and_suffix(path) == ("a", ".txt")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_members_end_to_end_are_one_text(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(b"one\n", suffix) + compress(b"two\n", suffix))
    assert read_bytes(path, "a") == b"one\ntwo\n"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_cut_short_and_one_of_another_format_are_named(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    whole = compress(TEXT.encode(), suffix)
    for content in (whole[: len(whole) // 2], b"plain text" * 9):
        path.write_bytes(content)
        for read in (lambda: read_bytes(path, "'a'"), lambda: lines(path), lambda: read_text(path, "'a'")):
            with pytest.raises(BadFile, match=r"a.* cannot be read"):
                read()


@pytest.mark.parametrize(
    ("text", "encoding", "hint"),
    [
        ("déjà vu " * 99, "latin-1", "cp1252"),
        ("text, é; " * 20, "cp1252", "cp1252"),
        (RUSSIAN, "cp1251", "cp1251"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (JAPANESE, "shift-jis", "shift-jis"),
        (JAPANESE, "euc-jp", "euc-jp"),
        ("这是一个中文句子。今天天气很好。" * 4, "gb18030", "gb18030"),
        ("plain text " * 20, "utf-16-le", "utf-16-le"),
    ],
)
def test_a_text_of_another_encoding_says_which_flag_and_which_value(text, encoding, hint, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(BadFile, match=f"'a' is not .*text .*; --data.encoding {hint} may be its encoding"):
        read_text(path, "'a'")
    assert read_text(path, "'a'", hint) == text
    assert lines(path, hint) == text
    if not encoding.startswith("utf-16"):
        with pytest.raises(BadFile, match=f"a.txt is not utf-8 text; --data.encoding {hint} may be its encoding"):
            lines(path)


def test_an_encoding_that_python_does_not_know():
    for encoding in ("utf-9", "base64", "rot13"):
        with pytest.raises(ValueError, match=f"--data.encoding {encoding}, expected one that Python knows"):
            check_encoding(encoding)
    for encoding in ("utf-8", "cp1252", "utf-16", "shift-jis"):
        check_encoding(encoding)


def test_compression_is_what_other_programs_write(tmp_path):
    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        assert module.decompress(compress(b"text", suffix)) == b"text"
