"""The pattern language: what it reads, what it says of a mistake, and that it reads what it writes."""

import functools
import time

import numpy as np
import pytest

import zoo
from zoo.stack.mixers import CHANNEL_MIXERS
from zoo.stack.pattern import Repeat, Word, fold, pattern_mixers

MAMBA, ATTENTION, TRANSFORMER, MLP = Word(("mamba",)), Word(("attn",)), Word(("attn",), "mlp"), Word((), "mlp")
MAMBA2, NEAR = Word(("mamba2",)), Word(("attn[window=4]",), "mlp")


@pytest.mark.parametrize(
    ("pattern", "n_layers", "words"),
    [
        ("mamba", 3, [MAMBA] * 3),
        ("attn/mlp", 2, [TRANSFORMER] * 2),
        ("mamba attn/mlp", 3, [MAMBA, TRANSFORMER, MAMBA]),
        ("mamba*3 attn/mlp", 4, [MAMBA] * 3 + [TRANSFORMER]),
        ("mamba*2 attn/mlp", 7, [MAMBA, MAMBA, TRANSFORMER] * 2 + [MAMBA]),
        ("mamba -/mlp attn -/mlp", 5, [MAMBA, MLP, ATTENTION, MLP, MAMBA]),
        ("attn/-", 1, [ATTENTION]),
        ("attn/mlp*2  mamba/mlp*1", 3, [TRANSFORMER, TRANSFORMER, Word(("mamba",), "mlp")]),
        ("attn[window=4]/mlp*2 -/mlp[d_ff=6]", 3, [NEAR, NEAR, Word((), "mlp[d_ff=6]")]),
        # Mixers side by side.
        ("mamba2+attn", 2, [Word(("mamba2", "attn"))] * 2),
        ("attn[window=4]+mamba2+attn/mlp*2", 2, [Word(("attn[window=4]", "mamba2", "attn"), "mlp")] * 2),
        ("attn[rope_base=1e+5]+mamba", 1, [Word(("attn[rope_base=100000]", "mamba"))]),
        # Blocks that are one.
        ("mamba attn/mlp@a", 4, [MAMBA, TRANSFORMER._replace(shared="a")] * 2),
        ("mamba+attn@b_2*2 attn@1", 3, [Word(("mamba", "attn"), None, "b_2")] * 2 + [Word(("attn",), None, "1")]),
        # Blocks for a share of the positions, by number or by depth.
        ("mamba:0.125", 1, [MAMBA._replace(capacity=0.125)]),
        ("attn/mlp:1@a*2", 2, [TRANSFORMER._replace(capacity=1.0, shared="a")] * 2),
        ("attn/mlp:cosine", 4, [TRANSFORMER._replace(capacity=c) for c in (None, 0.75, 0.25, 0.15)]),
        # Groups.
        ("(mamba attn/mlp)*2 attn", 5, [MAMBA, TRANSFORMER] * 2 + [ATTENTION]),
        ("((mamba*2 attn)*2 -/mlp)*2", 14, ([MAMBA, MAMBA, ATTENTION] * 2 + [MLP]) * 2),
        ("( mamba )*2 (attn) mamba", 6, [MAMBA, MAMBA, ATTENTION, MAMBA, MAMBA, MAMBA]),
        ("(mamba attn[window=4]/mlp*2)", 4, [MAMBA, NEAR, NEAR, MAMBA]),
        # Megatron's letters, each a block of its own.
        ("M-M*-", 7, [MAMBA2, MLP, MAMBA2, ATTENTION, MLP, MAMBA2, MLP]),
        (" M ", 2, [MAMBA2] * 2),
        ("*", 1, [ATTENTION]),
        ("--", 2, [MLP] * 2),
        # One spelling of a value and one order of options.
        ("attn[window=04,bias=True]", 1, [Word(("attn[bias=true,window=4]",))]),
        ("attn[rope_base=1.6e5,n_heads=None]", 1, [Word(("attn[n_heads=none,rope_base=160000]",))]),
        ("attn[position=none] attn[position=rope]", 2, [Word((f"attn[position={p}]",)) for p in ("none", "rope")]),
        ("mamba[expand=1.5,dt_rank=3]/mlp", 1, [Word(("mamba[dt_rank=3,expand=1.5]",), "mlp")]),
    ],
)
def test_a_pattern_reads_as_one_word_a_block(pattern, n_layers, words):
    assert zoo.parse_pattern(pattern, n_layers) == tuple(words)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "pattern='', expected at least one word"),
        ("  ", "expected at least one word"),
        ("manba", "unknown mixer 'manba', did you mean 'mamba'\\? Known: attn, linear_attn, m2, mamba"),
        ("attn/mpl", "unknown channel mixer 'mpl', did you mean 'mlp'\\? Known: mlp"),
        ("mlp", "unknown mixer 'mlp'. Known: attn, linear_attn, m2, mamba"),
        ("mamba/attn", "unknown channel mixer 'attn'. Known: mlp"),
        ("-", "'-' is an empty block"),
        ("-/-", "'-/-' is an empty block"),
        ("mamba*0", r"'mamba\*0' is an empty block"),
        ("mamba*", r"cannot read 'mamba\*', expected mixer or mixer\+mixer, perhaps with /channel"),
        ("mamba*x", "cannot read"),
        ("mamba*-1", "cannot read"),
        ("attn/", "cannot read 'attn/'"),
        ("/mlp", "cannot read '/mlp'"),
        ("attn/mlp/mlp", "cannot read"),
        ("mamba+", r"cannot read 'mamba\+'"),
        ("+mamba", "cannot read"),
        ("mamba++attn", "cannot read"),
        ("mamba+atn", "unknown mixer 'atn', did you mean 'attn'"),
        ("mamba+-", "unknown mixer '-'"),
        ("attn/mlp+mlp", "cannot read"),
        ("mamba:x", "capacity='x', expected a number or cosine"),
        ("mamba:0", r"capacity=0\.0, expected more than 0, at most 1"),
        ("mamba:0.5/mlp", "cannot read"),
        ("mamba:cosine@a", "'a' is one block, expected a number for cosine"),
        ("attn@a mamba@a", "'attn@a' and 'mamba@a', expected @a to be one block"),
        ("(attn@a)*2 attn[window=3]@a", r"'attn@a' and 'attn\[window=3\]@a', expected @a to be one"),
        ("attn@a/mlp", "cannot read 'attn@a/mlp'"),
        ("attn@a+mamba", "cannot read"),
        ("attn@", "cannot read"),
        ("attn@a b", "unknown mixer 'b'"),
        ("-@a", "'-@a' is an empty block"),
        ("(mamba", r"'\(' is not closed"),
        ("(mamba (attn)", r"'\(' is not closed"),
        ("mamba)*2", r"'\)\*2' closes no parenthesis"),
        ("()*2", r"'\)\*2' is an empty group"),
        ("(mamba)*0", r"'\)\*0' is an empty group"),
        ("(mamba)attn", r"cannot read '\)attn', expected mixer"),
        ("(mamba) *2", r"cannot read '\*2'"),
        ("(mamba manba)*2", "unknown mixer 'manba', did you mean 'mamba'"),
        ("(mamba*2 attn)*2", r"pattern='\(mamba\*2 attn\)\*2' has 6 blocks, more than n_layers=3"),
        ("M-MX", r"pattern='M-MX': unknown letter 'X'. Known: \*, -, E, M"),
        ("M-M|M-", r"unknown letter '\|'. Known: "),
        ("M-M-", r"pattern='M-M-' has 4 blocks, more than n_layers=3"),
        ("M -", "unknown mixer 'M'"),
        ("mamba*4", r"pattern='mamba\*4' has 4 blocks, more than n_layers=3"),
        ("attn[windw=3]", "unknown option of attn 'windw', did you mean 'window'\\? Known: bias, d_conv, head_dim"),
        ("attn/mlp[d_fff=3]", "unknown option of mlp 'd_fff', did you mean 'd_ff'"),
        ("mamba attn[window=x]", "attn.window=x, expected an integer or none"),
        ("attn[rope_base=none]", "attn.rope_base=none, expected a number"),
        ("attn[bias=maybe]", "attn.bias=maybe, expected true or false"),
        ("attn[position=learned]", "attn.position=learned, expected rope or alibi or none"),
        ("attn[window=0]", r"pattern='attn\[window=0\]': attn\[window=0\]: window=0, expected None or at least 1"),
        ("attn[window]", "option 'window' of attn, expected name=value"),
        ("attn[window=3,]", "option '' of attn, expected name=value"),
        ("attn[window=3,window=3]", "option window of attn is given twice"),
        ("m2[filter=3]", "m2.filter cannot be set in a pattern, only in the config"),
        ("attn[]", r"cannot read 'attn\[\]'"),
        ("attn[window=3", "cannot read"),
        ("attn[window=3, bias=true]", "cannot read"),
        ("attn*2[window=3]", "cannot read"),
        ("-[window=3]", "unknown mixer '-'"),
    ],
)
def test_a_bad_pattern_names_the_word(pattern, message):
    with pytest.raises(ValueError, match=message):
        zoo.BackboneConfig(n_layers=3, pattern=pattern)


def test_a_plain_word_goes_without_its_options():
    word, _ = zoo.parse_pattern("attn[window=2]+mamba/mlp[d_ff=6] mamba", 2)
    assert word.plain == Word(("attn", "mamba"), "mlp")
    assert MAMBA.plain == MAMBA


def test_the_mixers_of_a_pattern_are_those_of_all_its_words():
    assert pattern_mixers("attn[window=2]+mamba/mlp -/mlp mamba m2", 4) == {"attn[window=2]", "mamba", "m2"}


def test_the_letter_of_a_mixture_of_experts_waits_for_one(monkeypatch):
    monkeypatch.delitem(CHANNEL_MIXERS, "moe", raising=False)
    with pytest.raises(ValueError, match=r"pattern='ME': unknown channel mixer 'moe'\. Known: "):
        zoo.parse_pattern("ME", 2)
    monkeypatch.setitem(CHANNEL_MIXERS, "moe", CHANNEL_MIXERS["mlp"])
    assert zoo.parse_pattern("ME", 2) == (MAMBA2, Word((), "moe"))


@pytest.mark.parametrize(
    ("pattern", "n_layers", "canonical"),
    [
        ("mamba", 1, "mamba"),
        ("mamba", 24, "mamba*24"),
        ("mamba2 mamba2 mamba2*1 attn/mlp", 9, "(mamba2*3 attn/mlp)*2 mamba2"),
        ("mamba attn", 5, "(mamba attn)*2 mamba"),
        ("((mamba)*2 attn/-)*2 -/mlp", 14, "((mamba*2 attn)*2 -/mlp)*2"),
        ("attn[window=04,bias=True]+mamba", 2, "attn[bias=true,window=4]+mamba*2"),
        ("M-M-M*-", 7, "(mamba2 -/mlp)*2 mamba2 attn -/mlp"),
    ],
)
def test_the_canonical_pattern_tells_every_layer_once(pattern, n_layers, canonical):
    assert zoo.canonical_pattern(pattern, n_layers) == canonical
    assert zoo.canonical_pattern(canonical, n_layers) == canonical


def random_pattern(rng, depth=0):
    """Words, some with options or counts or mixers side by side, and groups of them, two deep at most."""
    texts = []
    for _ in range(rng.integers(1, 5)):
        if depth < 2 and rng.random() < 0.3:
            text = f"({random_pattern(rng, depth + 1)})"
        else:
            mixers = rng.choice(["mamba", "mamba2", "attn", "attn[window=4]", "attn[rope_base=1.6e5,bias=True]"], 2)
            text = "+".join(mixers[: rng.integers(1, 3)]) if rng.random() < 0.8 else "-/mlp"
            text += "/mlp[d_ff=064]" if rng.random() < 0.3 and "/" not in text else ""
        text = text if rng.random() < 0.9 else "attn/mlp@a"
        texts.append(text + (f"*{rng.integers(1, 4)}" if rng.random() < 0.4 else ""))
    return "  ".join(texts)


def test_a_pattern_that_is_written_reads_as_what_it_was_read_as():
    rng, shorter = np.random.default_rng(0), 0
    for _ in range(100):
        pattern = random_pattern(rng)
        words = zoo.parse_pattern(pattern, 2000)[: rng.integers(1, 24)]
        written = zoo.format_pattern(words)
        assert zoo.parse_pattern(written, len(words)) == words, pattern
        assert zoo.canonical_pattern(written, len(words)) == written
        shorter += len(written) < len(" ".join(map(str, words)))
    assert shorter > 50


def written_words(items):
    return sum(written_words(item.items) if isinstance(item, Repeat) else 1 for item in items)


def test_no_way_of_writing_a_pattern_has_fewer_words():
    """Against all ways, by brute force."""

    @functools.cache
    def fewest(letters):
        ways = [len(letters)]
        ways += [fewest(letters[:i]) + fewest(letters[i:]) for i in range(1, len(letters))]
        ways += [fewest(letters[:p]) for p in range(1, len(letters)) if letters[:p] * (len(letters) // p) == letters]
        return min(ways)

    rng = np.random.default_rng(0)
    for n in range(1, 13):
        for _ in range(10):
            letters = "".join(rng.choice(["M", "-", "*"], n, p=[0.4, 0.4, 0.2]))
            if letters != "-":
                assert written_words(fold(zoo.parse_pattern(letters, n))) == fewest(letters), letters


@pytest.mark.parametrize(
    ("n", "pattern", "written"),
    [
        (483, "(mamba2*7 attn/mlp)*60 mamba2*3", "(mamba2*7 attn/mlp)*60 mamba2*3"),
        (902, "attn mamba2*500 attn (mamba -/mlp)*200", "attn mamba2*500 attn (mamba -/mlp)*200"),
        (9999, "mamba2 " * 9999, "mamba2*9999"),
    ],
    ids=["hybrid", "parts", "thousands"],
)
def test_the_way_to_write_hundreds_of_layers_is_found_in_the_time_of_their_number(n, pattern, written):
    start = time.process_time()
    words = zoo.parse_pattern(pattern, n)
    assert zoo.format_pattern(words) == written
    assert zoo.parse_pattern(written, n) == words
    assert time.process_time() - start < 20


@pytest.mark.parametrize("letters", ["M-M*-", "MM*-" * 9, "*"])
def test_letters_are_written_as_they_were_read(letters):
    n = len(letters)
    assert zoo.canonical_pattern(letters, n, "megatron") == letters
    assert zoo.canonical_pattern(zoo.canonical_pattern(letters, n), n, style="megatron") == letters


@pytest.mark.parametrize(
    ("pattern", "style", "message"),
    [
        ("mamba2 attn/mlp", "megatron", "'attn/mlp' has no letter in Megatron's patterns, only mamba2, attn, -/mlp"),
        ("attn[window=4]", "megatron", r"'attn\[window=4\]' has no letter"),
        ("mamba2", "letters", "style='letters', expected 'words' or 'megatron'"),
    ],
)
def test_what_has_no_letter_is_named(unchecked, pattern, style, message):
    with pytest.raises(ValueError, match=message):
        zoo.canonical_pattern(pattern, 2, style)
