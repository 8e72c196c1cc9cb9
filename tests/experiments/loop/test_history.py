"""Runs as their folders say, whole and damaged."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from experiments import causal_lm, clip, distill, needles, vit, vlm
from experiments.encoders import finetune_presets, masked_lm
from experiments.loop import flags
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.history import COMMANDS, STAGES, find_runs, is_run, read_run
from experiments.loop.metrics import Metrics
from experiments.recall import presets as recall_presets
from experiments.retrieval import retrieve

CONFIGS = {
    "causal_lm": [causal_lm.Config],
    "bert pretrain": [masked_lm.Config],
    "bert finetune": [finetune_presets.Config],
    "bert retrieve": [retrieve.Config],
    "needles": [needles.Config],
    "vit": [vit.Config],
    "synthetic": list({type(config) for _, config in recall_presets.PRESETS.values()}),
    "distill": [distill.Config],
    "vlm": [vlm.Config],
    "clip": [clip.Config],
}
TINY = causal_lm.PRESETS["tiny"][1]


def write_run(folder, losses, *, config=TINY, name="bits_per_byte"):
    """A folder as a run leaves it: its evaluations at steps 10, 20, ..., and its last two checkpoints."""
    folder.mkdir(parents=True)
    if config is not None:
        flags.save_config(config, folder / "config.json")
    with Metrics(folder, tensorboard=False) as metrics, Checkpoints(folder, keep_last=2, best_metric=None) as kept:
        for step, loss in zip(range(10, 10 * len(losses) + 1, 10), losses, strict=True):
            metrics.write(step, {"loss": loss + 0.1, "learning_rate": 0.1})
            metrics.write(step, {"loss": loss, name: 2 * loss}, split="validation")
            kept.save(step, {"params": jnp.ones(3)}, data_state={})
    return folder


def test_every_command_is_known_by_one_field_of_its_configuration():
    assert CONFIGS.keys() == {*COMMANDS.values()}
    for command, kinds in CONFIGS.items():
        for kind in kinds:
            fields = {field.name for field in dataclasses.fields(kind)}
            assert [COMMANDS[name] for name in COMMANDS if name in fields] == [command]
    assert {*STAGES} <= {field.name for field in dataclasses.fields(distill.Config)}


def test_a_run_is_read_with_its_last_and_best(tmp_path):
    run = read_run(write_run(tmp_path / "run", [3.0, 1.0, 2.0]))
    assert (run.command, run.pattern, run.steps, run.asked) == ("causal_lm", "mamba", 30, 350)
    assert run.evaluations[-1] == {"step": 30, "split": "validation", "loss": 2.0, "bits_per_byte": 4.0}
    assert run.best == {"step": 20, "split": "validation", "loss": 1.0, "bits_per_byte": 2.0}
    assert run.problems == []


def test_several_seeds_are_one_run_of_their_means(tmp_path):
    config = dataclasses.replace(finetune_presets.PRESETS["tiny"][1], seeds=(3, 5, 7))
    (tmp_path / "several").mkdir()
    flags.save_config(config, tmp_path / "several/config.json")
    for seed, losses in ((3, [3.0, 1.0]), (5, [2.0])):
        write_run(tmp_path / f"several/seed-{seed}", losses, config=dataclasses.replace(config, seeds=()))
    (run,) = [run for run in find_runs(tmp_path)]
    assert (run.command, run.steps, run.asked, run.seeds) == ("bert finetune", 0, None, (3, 5, 7))
    assert [(record["step"], record["loss"]) for record in run.evaluations] == [(10, 2.5)]
    assert run.problems == ["not begun: seed-7"]
    assert len(find_runs(tmp_path / "several")) == 3


def test_the_stages_of_a_distillation_follow_one_another(tmp_path):
    folder = tmp_path / "distilled"
    for name, losses in (("layers", [3.0, 2.0]), ("logits", [1.0])):
        write_run(folder / name, losses, config=None)
    flags.save_config(distill.PRESETS["tiny"][1], folder / "config.json")
    write_run(folder / "student", [])
    (run,) = find_runs(tmp_path)
    assert (run.command, run.pattern, run.steps, run.asked) == ("distill", "linear_attn", 30, 240)
    assert [(record["step"], record["loss"]) for record in run.evaluations] == [(10, 3.0), (20, 2.0), (30, 1.0)]


def cut_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def cut_metrics(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "spl')


def cut_checkpoint(folder):
    path = next((folder / "checkpoints/20").rglob("record.json"))
    path.write_text("")


def set_aside(folder):
    (folder / "checkpoints/20").rename(folder / "checkpoints/20.damaged")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (cut_config, "config.json cannot be read: "),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no configuration"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "model.json").write_text("{"), "model.json cannot be read: "),
        (cut_metrics, "metrics.jsonl: line 5 cannot be read"),
        (lambda folder: (folder / "metrics.jsonl").write_bytes(bytes(range(256))), "metrics.jsonl: line 1"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "there is no checkpoint"),
        (lambda folder: (folder / "checkpoints/30.partial").mkdir(), "checkpoint 30 is half written"),
        (
            lambda folder: (folder / "checkpoints/20").rename(folder / "checkpoints/20.damaged"),
            "checkpoint 20 was damaged",
        ),
        (
            lambda folder: (folder / "checkpoints/20/manifest.json").unlink(),
            "checkpoint 20 is damaged: manifest.json is",
        ),
        (cut_checkpoint, "checkpoint 20 is damaged: record.json has 0 bytes instead of"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(spoil, problem, tmp_path):
    folder = write_run(tmp_path / "run", [2.0, 1.0])
    spoil(folder)
    (run,) = find_runs(tmp_path)
    assert run.problems
    assert all(line.startswith(problem) for line in run.problems)


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "run").mkdir()
    flags.save_config(TINY, tmp_path / "run/config.json")
    assert read_run(tmp_path / "run").problems == ["there is no checkpoint"]
    (tmp_path / "run/config.json").rename(tmp_path / "run/config.json.partial")
    assert [run.problems for run in find_runs(tmp_path)] == [["there is no config.json", "there is no checkpoint"]]


def test_a_published_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert not is_run(tmp_path)
