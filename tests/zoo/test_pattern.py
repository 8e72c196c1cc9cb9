"""The pattern language: what it reads, and what it says of a mistake."""

import pytest

import zoo
from zoo.pattern import Word, pattern_mixers

MAMBA, ATTENTION, TRANSFORMER, MLP = Word(("mamba",)), Word(("attn",)), Word(("attn",), "mlp"), Word((), "mlp")
NEAR = Word(("attn[window=4]",), "mlp")


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
        ("manba", "unknown mixer 'manba', did you mean 'mamba'\\? Known: attn, m2, mamba"),
        ("attn/mpl", "unknown channel mixer 'mpl', did you mean 'mlp'\\? Known: mlp"),
        ("mlp", "unknown mixer 'mlp'. Known: attn, m2, mamba"),
        ("mamba/attn", "unknown channel mixer 'attn'. Known: mlp"),
        ("-", "'-' is an empty block"),
        ("-/-", "'-/-' is an empty block"),
        ("mamba*0", r"'mamba\*0' is an empty block"),
        ("mamba*", r"cannot read 'mamba\*', expected mixer, mixer/channel or either with"),
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
        ("mamba*4", r"pattern='mamba\*4' has 4 blocks, more than n_layers=3"),
        ("attn[windw=3]", "unknown option of attn 'windw', did you mean 'window'\\? Known: bias, head_dim"),
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
