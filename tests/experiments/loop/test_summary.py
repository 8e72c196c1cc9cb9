"""What runs of several seeds reached, as it is printed and kept."""

import json

import pytest

from experiments.loop.summary import report, save_summary, summarise

SCORES = [
    {"validation": {"loss": 0.5, "accuracy": 0.8}, "test": {"loss": 1.5, "accuracy": 0.7}},
    {"validation": {"loss": 0.5, "accuracy": 0.9}, "test": {"loss": 2.5, "accuracy": 0.7}},
]


def test_a_report_has_a_column_for_each_metric_but_the_loss():
    assert report(summarise(SCORES[:1]), 1).splitlines() == [
        "after the last step:",
        "              accuracy",
        "  validation    0.8000",
        "  test          0.7000",
    ]
    assert report(summarise(SCORES), 2).splitlines() == [
        "after the last step, mean of 2 seeds ± their standard deviation:",
        "                     accuracy",
        "  validation  0.8500 ± 0.0707",
        "  test        0.7000 ± 0.0000",
    ]
    with pytest.raises(ValueError, match="--metrics f1, expected some of accuracy"):
        report(summarise(SCORES), 2, ["f1"])


def test_results_are_of_each_run_and_of_all(tmp_path):
    save_summary(tmp_path, [3, 5], SCORES, images_per_second=7.0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == [{"seed": 3} | SCORES[0], {"seed": 5} | SCORES[1]]
    assert results["summary"]["test"]["loss"] == {"mean": 2.0, "std": pytest.approx(0.5**0.5)}
    assert results["images_per_second"] == 7.0
