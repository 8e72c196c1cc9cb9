"""A column of numbers of which one is written "nan" was taken for one of classes, one for each number."""

import pytest

from experiments.data.labelled import LabelledConfig, load_labelled


def load(path, kind=None, **options):
    return load_labelled(LabelledConfig(path=str(path), label_column="score", **options), kind)


@pytest.mark.parametrize("missing", ["nan", "NaN", "-inf", "N/A", "null", "?"])
def test_a_number_that_is_missing_in_a_csv_is_named(missing, tmp_path):
    """What users met: "classification of 48 classes" where 47 ratings were to be learned, and no word of it."""
    rows = [f"text {i},{i / 2}" for i in range(20)] + [f"text 20,{missing}"]
    (tmp_path / "d.csv").write_text("\n".join(["text,score", *rows]))
    with pytest.raises(ValueError, match=r"holds 20 numbers and '.*'; --kind regression expects numbers alone"):
        load(tmp_path / "d.csv")
    data = load(tmp_path / "d.csv", "regression", skip_bad=True)
    assert sum(len(split.labels) for split in data.splits.values()) == 20


def test_words_among_which_is_one_for_nothing_are_classes(tmp_path):
    rows = [f"text {i},{('none', 'for', 'against')[i % 3]}" for i in range(21)]
    (tmp_path / "d.csv").write_text("\n".join(["text,score", *rows]))
    assert load(tmp_path / "d.csv").classes == ("against", "for", "none")
