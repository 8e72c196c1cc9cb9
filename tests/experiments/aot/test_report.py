import pytest

from experiments.aot.report import BEGIN, END, HEAD, ITEMS, with_row
from tests.places import ROOT

DOCUMENT = f"before\n\n{BEGIN}\n\n{END}\n\nafter\n"


def test_a_row_comes_at_the_end_or_in_place_of_the_one_about_the_same():
    text = with_row(DOCUMENT, "| a | train | 8 | h100 | 1 |")
    text = with_row(text, "| b | train | 8 | h100 | 2 |")
    text = with_row(text, "| a | train | 8 | h100 | 3 |")
    assert text.splitlines()[4] == HEAD
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| --- | --- | --: | --- | --: | --: | --: | --: | --: |",
        "| a | train | 8 | h100 | 3 |",
        "| b | train | 8 | h100 | 2 |",
    ]
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\n\nafter\n")
    with pytest.raises(ValueError, match="has no lines"):
        with_row("no table", "| a |")


def test_the_report_of_the_results_is_of_these_steps():
    table = (ROOT / "RESULTS.md").read_text().partition(BEGIN)[2].partition(END)[0]
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()[4:] if line}
    assert rows <= {(item.name, item.what) for item in ITEMS}
