"""Text that comes token by token is the text of all of them, whatever the decoder."""

import functools

import jax
import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from experiments.causal.continuations import Continuation, continue_prompts, first_of, until_stop
from experiments.data import text_stream
from experiments.data.text_stream import TextStream, stream_text
from experiments.data.tokenizers import BERT_SPECIALS, ByteTokenizer, SubwordTokenizer, train_bpe, wordpiece

WRITTEN = ["a naïve cat sat", "  on the mat,  ", "snow 雪 and 🙂🙂 here", "def f(x):\n    return x\n\n"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(prefix, *, fallback, strip):
    """As Llama's (bytes for what is not in the vocabulary, a space stripped at the front), or T5's (Metaspace)."""
    words = sorted({word for text in WRITTEN[:2] for word in text.split()})
    known = [*map(chr, range(33, 127)), "▁", "▁▁", *(f"▁{word}" for word in words), *words]
    names = dict.fromkeys(["<unk>", "</s>", *(BYTES if fallback else ()), *known])
    scores = [(name, -1.0 if len(name) > 1 else -3.0) for name in names]
    tokenizer = hf.Tokenizer(hf.models.Unigram(scores, unk_id=0, byte_fallback=fallback))
    tokenizer.add_special_tokens(["</s>"])
    if strip:
        tokenizer.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
        parts = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        tokenizer.decoder = hf.decoders.Sequence([*parts, hf.decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=prefix)
        tokenizer.decoder = hf.decoders.Metaspace(prepend_scheme=prefix)
    return SubwordTokenizer(tokenizer)


@functools.cache
def made(kind):
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "byte-level":
        return train_bpe(WRITTEN, 300)
    if kind == "wordpiece":
        pieces = [
            "a",
            "##a",
            "cat",
            "##at",
            "sat",
            "s",
            ",",
            ".",
            "'",
            "n",
            "don",
            "##t",
            "the",
            *map(chr, range(98, 123)),
        ]
        return wordpiece({name: i for i, name in enumerate(dict.fromkeys([*BERT_SPECIALS, *pieces]))})
    if kind == "metaspace":
        return sentencepiece("always", fallback=False, strip=False)
    return sentencepiece("first", fallback=True, strip=True)


few = settings(max_examples=30, derandomize=True, deadline=None, database=None)
EXACT = ("bytes", "byte-level", "wordpiece", "metaspace")
KINDS = (*EXACT, "byte-fallback")


def streamed(tokenizer, ids, before=()):
    return "".join(stream_text(TextStream(tokenizer, before), ids))


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_streamed_text_is_the_text_of_all_tokens(kind, data):
    tokenizer = made(kind)
    letters = st.text(st.sampled_from("a cat,.  naïve 雪🙂🙂\n'"), max_size=60)
    text = data.draw(letters)
    ids = tokenizer.encode(text).tolist()
    cut = data.draw(st.integers(0, len(ids)))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    before = tokenizer.decode(ids[:cut])
    if "\ufffd" not in before:
        assert before + streamed(tokenizer, ids[cut:], ids[:cut]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", EXACT)
@few
@given(data=st.data())
def test_tokens_in_any_order_are_streamed_as_they_decode(kind, data):
    tokenizer = made(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=100))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_a_stop_string_ends_streamed_text_where_it_ends_the_whole(kind, data):
    tokenizer = made(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stop = data.draw(st.lists(st.text(st.sampled_from("a ct雪\n"), min_size=1, max_size=3), max_size=3))
    whole = streamed(tokenizer, ids)
    assert "".join(until_stop(stream_text(TextStream(tokenizer), ids), stop)) == whole[: first_of(whole, stop)]


def test_the_space_before_the_first_word_is_said():
    tokenizer = made("metaspace")
    prompt, more = tokenizer.encode("a cat").tolist(), tokenizer.encode("sat").tolist()
    assert streamed(tokenizer, more, prompt) == " sat"
    assert streamed(tokenizer, more) == "sat"  # at the start of a text there is none


@pytest.mark.parametrize(("apart", "expected"), [(False, " sat the cat"), (True, "sat the cat")])
def test_a_continuation_reads_on_behind_its_prompt(monkeypatch, apart, expected):
    tokenizer = made("metaspace")
    more = [*tokenizer.encode("sat the cat").tolist(), tokenizer.eot]
    monkeypatch.setattr(zoo, "generate_stream", lambda *_, **__: (np.array([i]) for i in more))
    prompt, options = tokenizer.encode("a cat").tolist(), {"sampling": zoo.Sampling(), "key": jax.random.key(0)}
    (said,) = continue_prompts(None, tokenizer, [prompt], 99, **options, apart=apart)
    assert said == Continuation(expected, len(more), "end")
    (said,) = continue_prompts(None, tokenizer, [prompt], 99, **options, apart=apart, stop=["e c", "nothing"])
    assert (said.text, said.finished) == (expected.removesuffix("e cat"), "stop")


def test_a_character_comes_when_it_is_complete():
    tokenizer = made("bytes")
    stream = TextStream(tokenizer)
    assert [stream.add(i) for i in "a🙂".encode()] == ["a", "", "", "", "🙂"]
    assert [stream.add(i) for i in "🙂".encode()[:2]] + [stream.rest()] == ["", "", "\ufffd"]
    stream = TextStream(made("byte-fallback"))
    ids = made("byte-fallback").encode("雪").tolist()[-3:]
    assert [stream.add(i) for i in (*ids, ids[0], tokenizer.eot)] == ["", "", "雪", "", ""]


def test_bytes_that_are_no_text_take_back_nothing():
    tokenizer = made("byte-fallback")
    snow = tokenizer.encode("雪").tolist()[-3:]
    (a,) = tokenizer.encode("a").tolist()[-1:]
    assert streamed(tokenizer, [*snow, snow[0], a]).startswith("雪\ufffd")


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_decoded_in_short_pieces(kind, monkeypatch):
    tokenizer = made(kind)
    ids = tokenizer.encode("a cat, 🙂🙂 sat " * 100).tolist()
    longest, decode = 0, tokenizer.decode

    def counted(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    stream = TextStream(tokenizer)
    monkeypatch.setattr(tokenizer, "decode", counted)
    assert "".join([*map(stream.add, ids), stream.rest()]) == decode(ids)
    assert longest < 5 * text_stream._BEHIND
