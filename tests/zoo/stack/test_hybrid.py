"""The allocator of hybrids: its published patterns, and its counts."""

import pytest

import zoo


@pytest.mark.parametrize(
    ("n_layers", "letters"),
    [
        # That of the 8B hybrid, examples/mamba in NVIDIA/Megatron-LM.
        (56, "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"),
        (24, "M-M-M--*M-M-M-M-*M--M-M-"),
        (12, "M-M-M-*-M-M-"),
    ],
)
def test_the_patterns_of_the_study_come_out(n_layers, letters):
    assert zoo.hybrid_pattern(n_layers, 0.08, 0.5, style="megatron") == letters
    words = zoo.parse_pattern(zoo.hybrid_pattern(n_layers, 0.08, 0.5), n_layers)
    assert words == zoo.parse_pattern(letters, n_layers)


def test_the_study_has_the_defaults_and_words_are_canonical():
    assert zoo.hybrid_pattern() == zoo.canonical_pattern(zoo.hybrid_pattern(style="megatron"), 56)
    assert zoo.hybrid_pattern(12) == "(mamba2 -/mlp)*3 attn (-/mlp mamba2)*2 -/mlp"


def test_every_share_is_met():
    for n_layers in range(1, 40, 3):
        for attention in (0.0, 0.1, 0.25, 0.5, 1.0):
            for mlp in (0.0, 0.1, 0.3, 0.5, 1.0):
                n_attention, n_mlp = round(n_layers * attention), round(n_layers * mlp)
                if n_attention + n_mlp > n_layers:
                    continue
                letters = zoo.hybrid_pattern(n_layers, attention, mlp, style="megatron")
                counts = [letters.count(letter) for letter in "*-M"]
                assert counts == [n_attention, n_mlp, n_layers - n_attention - n_mlp]


@pytest.mark.parametrize(("attention", "mlp"), [(0.6, 0.6), (-0.1, 0.5), (0.1, -0.5), (1.5, 0.0)])
def test_shares_must_be_shares(attention, mlp):
    with pytest.raises(ValueError, match=rf"attention={attention} and mlp={mlp}, expected shares of n_layers=10"):
        zoo.hybrid_pattern(10, attention, mlp)
