"""GLUE's tasks from a folder laid out as the hub's, and the recipes as they were published."""

import json

import datasets
import pytest

from experiments.data.labelled import load_labelled
from experiments.encoders import finetune, glue
from tests.experiments.encoders.test_finetune import SMALL

COLUMNS = {"label": datasets.Value("int32"), "idx": datasets.Value("int32")}


def write_glue(folder, task, rows, names=None):
    """Splits of one task as parquet files, described by a README as on the hub."""
    label = datasets.Value("float32") if names is None else datasets.ClassLabel(names=names)
    text = [column for column in glue.TASKS[task].columns if column is not None]
    features = datasets.Features({column: datasets.Value("string") for column in text} | {"label": label})
    lines = ["---", "configs:", f"- config_name: {task}", "  data_files:"]
    for split, examples in rows.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        table = [dict(zip((*text, "label"), example, strict=True)) for example in examples]
        datasets.Dataset.from_list(table, features=features).to_parquet(folder / task / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {task}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return f"{folder}:{task}"


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def config_of(name, hub):
    config = finetune.PRESETS[name][1]
    return glue_data(config, hub), config.kind


def glue_data(config, hub):
    import dataclasses

    return dataclasses.replace(config.data, hub=hub)


def test_mnli_has_two_sets_to_evaluate_on_and_two_secret_ones(tmp_path):
    examples = [(f"premise {i}", f"hypothesis {i}", i % 3) for i in range(9)]
    secret = [("p", "h", -1)]
    splits = {"train": examples, "validation_matched": examples[:3], "validation_mismatched": examples[3:6]}
    splits |= {"test_matched": secret, "test_mismatched": secret}
    names = ["entailment", "neutral", "contradiction"]
    hub = write_glue(tmp_path / "glue", "mnli", splits, names)
    data = load_labelled(*config_of("mnli", hub))
    assert list(data.splits) == list(splits)
    assert data.classes == tuple(names)
    assert data.splits["train"].texts[0] == "premise 0"
    assert data.splits["train"].seconds[0] == "hypothesis 0"
    assert data.splits["validation_mismatched"].labels == names
    assert data.splits["test_matched"].labels is None


def test_stsb_is_a_number(tmp_path):
    examples = [(f"a {i}", f"b {i}", i / 2) for i in range(8)]
    hub = write_glue(tmp_path / "glue", "stsb", {"train": examples, "validation": examples, "test": [("a", "b", -1)]})
    data = load_labelled(*config_of("stsb", hub))
    assert data.kind == "regression"
    assert list(data.splits) == ["train", "validation"]
    assert data.splits["validation"].labels == [i / 2 for i in range(8)]


@pytest.mark.slow
def test_cola_by_name_ends_with_its_metric_and_predictions_for_the_secret_test(tmp_path, run_command):
    examples = [(f"sentence {i}", i % 2) for i in range(12)]
    splits = {"train": examples, "validation": examples[:5], "test": [("one", -1), ("two", -1)]}
    hub = write_glue(tmp_path / "glue", "cola", splits, ["unacceptable", "acceptable"])
    arguments = ("cola", "--data.hub", hub, "--run-dir", "run", *SMALL, "--epochs", 1)
    status, out, err = run_command(finetune, *arguments)
    assert status == 0, err
    table = out.split("after the last step:")[1].splitlines()
    assert table[1].split() == ["matthews"]
    assert table[2].split()[0] == "validation"
    predictions = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [(p["split"], p["row"], p["label"]) for p in predictions] == [("test", 0, None), ("test", 1, None)]
    assert {p["predicted"] for p in predictions} <= {"unacceptable", "acceptable"}


def test_every_task_has_a_preset_for_every_recipe():
    for recipe, tasks in glue.RECIPES.items():
        assert tasks.keys() == glue.TASKS.keys()
        for task, values in tasks.items():
            config = finetune.PRESETS[task if recipe == "mosaicbert" else f"{task}-{recipe}"][1]
            assert config.optim.learning_rate == values.learning_rate
            assert config.data.hub == f"nyu-mll/glue:{task}"


def test_recipes_by_hand():
    mosaic = finetune.PRESETS["mnli"][1]
    assert (mosaic.epochs, mosaic.train.batch_size, mosaic.max_len, mosaic.pool) == (3, 48, 256, "first")
    # Decoupled decay of 5e-6 a step at a peak of 5e-5 is AdamW's 0.1.
    assert mosaic.optim.weight_decay == pytest.approx(0.1)
    assert (mosaic.optim.schedule, mosaic.optim.final_fraction, mosaic.warmup_fraction) == ("linear", 0.0, 0.06)
    small = finetune.PRESETS["rte-m2-80m"][1]
    assert (small.epochs, small.optim.weight_decay, small.max_len) == (6, 0.01, 128)  # torch's AdamW already
    assert finetune.PRESETS["qnli-m2-80m"][1].pool == "mean"
    assert finetune.PRESETS["stsb-m2-341m"][1].epochs == 8
