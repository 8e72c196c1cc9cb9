"""Texts and streams for the tests of data, and how to read them back."""

import bz2
import gzip
import lzma
import random
from pathlib import Path

import numpy as np
import pytest

from experiments.data.corpus import Corpus, DataConfig, TokenStream, load_corpus

LONG = "The quick brown fox jumps over the lazy dog.\n" * 30


def stream_of(*lengths: int, eot: int = 256) -> TokenStream:
    """A stream of random byte documents of these lengths."""
    draw = np.random.default_rng(0)
    tokens = np.concatenate([np.append(eot, draw.integers(0, 256, length)) for length in lengths] + [[eot]])
    starts = np.cumsum([0, *(length + 1 for length in lengths[:-1])])
    names = np.array([str(i).encode() for i in range(len(lengths))])
    return TokenStream("train", tokens.astype(np.uint16), starts, names, n_bytes=sum(lengths))


def write_documents(folder: Path, n: int, characters: int = 300) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    texts = {
        f"{i:03}.txt": f"document {i} " + "".join(random.Random(i).choices("abc é\n", k=characters)) for i in range(n)
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return texts


def documents_of(corpus: Corpus) -> dict[str, dict[str, str]]:
    return {
        stream.name: {
            stream.document_name(i): corpus.tokenizer.decode(stream.document(i)) for i in range(stream.n_documents)
        }
        for stream in (corpus.train, corpus.validation)
    }


def fails(config: DataConfig) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as failure:
        load_corpus(config)
    message = str(failure.value)
    assert "\n" not in message
    return message


def compress(content: bytes, suffix: str) -> bytes:
    """What a file with this suffix holds."""
    import pyarrow

    kinds = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}
    kinds[".zst"] = lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True)
    return kinds[suffix](content)
