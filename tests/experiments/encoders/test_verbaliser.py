"""Which words stand for the classes, and where [MASK] ends up."""

import pytest

from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer, train_bpe, train_wordpiece
from experiments.encoders.verbaliser import OPTIONS, SINGLE, choose, encode_prompts, one_token

TEXTS = ["good bad great sports politics answer it was a film, and the game goes on: B C"] * 5
WORDPIECE, BPE = train_wordpiece(TEXTS, 400), train_bpe(TEXTS, 400)


def test_names_of_one_token_are_their_own_words():
    chosen = choose(WORDPIECE, ("good", "bad"))
    assert chosen.words == ("good", "bad")
    assert [WORDPIECE.decode([token]) for token in chosen.ids] == ["good", "bad"]
    assert chosen.template == SINGLE
    # In a byte-level BPE a word has the space before it.
    assert BPE.decode(choose(BPE, ("great", "bad")).ids) == " great bad"


def test_longer_names_lend_a_token_of_their_own():
    assert choose(WORDPIECE, ("game.sports", "game.politics")).words == ("game", "politics")
    # Where tokens are bytes, the space before a name is one, and no word.
    assert choose(ByteTokenizer(), ("positive", "negative")).words == ("p", "n")


def test_names_without_one_are_options_with_letters():
    chosen = choose(WORDPIECE, ("!", "?"))
    assert chosen.words == ("A", "B")
    assert chosen.template == OPTIONS.replace("{options}", "A: ! B: ?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["good"]}, "--verbaliser has 1 words, expected 2"),
        ({"words": ["good", "unspeakable"]}, r"--verbaliser: 'unspeakable' is \d+ tokens, expected one"),
        ({"words": ["good", "Good"]}, "uses a token twice"),
        ({"template": "{text} It was."}, r"has 0 \[MASK\], expected one"),
        ({"template": "It was [MASK]."}, r"has 0 \{text\}, expected one"),
        ({"template": "{text} {second} [MASK]"}, r"there is no --data\.second-column"),
        ({"template": "{text} [MASK]", "pairs": True}, r"has 0 \{second\}, expected one"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        choose(WORDPIECE, ("good", "bad"), **options)


def test_unknown_words_are_no_words():
    assert one_token(WORDPIECE, "雪") is None
    assert one_token(WORDPIECE, "[SEP]") is None


@pytest.mark.parametrize("tokenizer", [WORDPIECE, BPE, ByteTokenizer()])
def test_the_template_is_whole_however_long_the_text(tokenizer):
    special = special_tokens(tokenizer)
    after = tokenizer.encode(" was.")
    prompts = encode_prompts(tokenizer, "{text} It [MASK] was.", ["", "film", "film " * 100], None, max_len=40)
    for row, place in zip(prompts.rows, prompts.positions, strict=True):
        assert len(row.tokens) <= 40
        assert row.tokens[place] == special.mask
        assert (row.tokens == special.mask).sum() == 1
        assert row.tokens[place + 1 :].tolist() == [*after, special.sep]
    assert len(prompts.rows[-1].tokens) == 40
    assert prompts.rows[1].tokens[1 : 1 + len(tokenizer.encode("film"))].tolist() == tokenizer.encode("film").tolist()


def test_pairs_share_the_room():
    byte = ByteTokenizer()
    prompts = encode_prompts(byte, "{text}?[MASK],{second}", ["a" * 50, "a" * 50], ["b" * 50, "bb"], max_len=25)
    texts = [byte.decode(row.tokens) for row in prompts.rows]
    assert texts == ["a" * 10 + "?," + "b" * 10, "a" * 18 + "?," + "bb"]


def test_a_template_longer_than_the_row_is_refused():
    with pytest.raises(ValueError, match=r"--template takes 13 of --max-len 13 tokens"):
        encode_prompts(ByteTokenizer(), "{text} very long[MASK]", ["x"], None, max_len=13)
