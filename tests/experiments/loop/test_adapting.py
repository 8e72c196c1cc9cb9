"""Runs that train adapters: what their checkpoints hold, that they resume, load, and become models or adapters."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import bert, causal_lm, convert, sample, vit
from experiments.loop.adapting import AdaptConfig, adapted
from experiments.loop.optim import OptimConfig
from experiments.loop.starting import with_options
from experiments.loop.train import Task
from tests.experiments.retrieval.test_beir import write_beir
from tests.experiments.retrieval.test_embed import make_model, save_run
from zoo.published.adapted_run import base_of
from zoo.published.checkpoint_files import read_params
from zoo.published.run_folder import find_checkpoint
from zoo.reuse.quantize import quantized_weights

IDS = jnp.arange(6)[None]
ADAPT = ["--init", "base", "--adapt.rank", "2", "--train.no-tensorboard"]
CAUSAL = ["tiny", "--data.path", "my.txt", "--data.tokenizer", "bytes", "--data.seq-len", "16", "--eval-batches", "1"]
CAUSAL += ["--train.batch-size", "2", "--train.eval-every", "2", "--train.save-every", "2", "--prompt=", *ADAPT]
CAUSAL += ["--optim.schedule", "wsd", "--optim.decay-fraction", "0", "--optim.warmup-steps", "0"]
CAUSAL += ["--adapt.targets", "in_proj|out_proj", "--adapt.alpha", "4"]


def params(model):
    return {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def trained(folder):
    return read_params(find_checkpoint(folder))


def test_checkpoints_hold_adapters_alone_and_the_folder_is_a_model(base, run_command, empty_folder):
    status, out, err = run_command(causal_lm, *CAUSAL, "--steps", "2", "--run-dir", "run")
    assert status == 0, err
    names = {f"backbone.layers.0.mixer.{m}.kernel" for m in ("in_proj", "out_proj")}
    assert set(trained(empty_folder / "run")) == {f"{name}.lora_{x}" for name in names for x in "AB"}
    size = 2 * (8 + 32) + 2 * (16 + 8)  # in_proj 8 x 32, out_proj 16 x 8
    said = re.search(r"adapters: (\d+) parameters are trained beside ([\d,]+), .* takes ([\d.]+) MB", out)
    assert said is not None
    assert (int(said[1]), int(said[2].replace(",", ""))) == (size, sum(x.size for x in params(base).values()))
    tuned = zoo.from_pretrained(empty_folder / "run")
    assert {name for name, x in params(tuned).items() if not np.array_equal(x, params(base)[name])} == names
    status, _, err = run_command(causal_lm, *CAUSAL, "--run-dir", "other", "--adapt.targets", "in_prj")
    assert (status, "targets='in_prj' matches nothing" in err) == (1, True)
    assert not (empty_folder / "other/config.json").exists()


def test_a_model_of_few_bits_is_trained_whole_unless_adapters_are(base, empty_folder):
    model = zoo.quantize(base, bits=8)
    task = Task(init=lambda rngs: model, loss=None, batches=None, evaluate=None, tokens_per_batch=1)
    whole, _ = adapted(task, AdaptConfig(), empty_folder / "run", OptimConfig(), steps=1, seed=0)
    assert params(whole.init(nnx.Rngs(0))).keys() == params(base).keys()
    beside, _ = adapted(task, AdaptConfig(rank=1), empty_folder / "run", OptimConfig(), steps=1, seed=0)
    assert quantized_weights(model)
    assert {name.rpartition(".")[2] for name in params(beside.init(nnx.Rngs(0)))} == {"lora_A", "lora_B"}
    other = with_options(model, dataclasses.replace(model.config, remat=True), ["model.remat"])
    assert quantized_weights(other).keys() == quantized_weights(model).keys()
    assert np.array_equal(other(jnp.ones((1, 3), jnp.int32)), model(jnp.ones((1, 3), jnp.int32)))


@pytest.mark.slow
def test_a_run_of_adapters_resumes_bitwise_and_converts(base, run_command, empty_folder):
    for steps in (("4", "straight"), ("2", "halves")):
        status, _, err = run_command(causal_lm, *CAUSAL, "--steps", steps[0], "--run-dir", steps[1])
        assert status == 0, err
    shutil.rmtree("base")  # which a run that goes on has no need of
    status, out, err = run_command(causal_lm, *CAUSAL, "--steps", "4", "--run-dir", "halves")
    assert (status, "resumed from step 2" in out) == (0, True), err
    halves, straight = trained(empty_folder / "halves"), trained(empty_folder / "straight")
    assert all(np.array_equal(halves[name], straight[name]) for name in straight)

    tuned = zoo.from_pretrained(empty_folder / "halves")
    status, out, err = run_command(sample, "halves", "--prompt", "line", "--max-new-tokens", "3")
    assert status == 0, err
    status, out, err = run_command(convert, "halves", "merged", "--layout", "official")
    assert status == 0, err
    np.testing.assert_allclose(zoo.from_pretrained("merged")(IDS), tuned(IDS), atol=1e-6)
    status, out, err = run_command(convert, "halves", "alone", "--adapter")
    assert (status, "read back and equal" in out) == (0, True), err
    again = zoo.load_adapter(zoo.from_pretrained(base_of(empty_folder / "halves")), "alone")
    np.testing.assert_allclose(zoo.merge_lora(again)(IDS), tuned(IDS), atol=1e-6)
    assert json.loads((empty_folder / "alone/adapter_config.json").read_text())["lora_alpha"] == 4
    status, _, err = run_command(convert, "merged", "none", "--adapter")
    assert (status, "expected the folder of a run of --adapt.rank" in err) == (1, True)


@pytest.mark.slow
def test_classifiers_of_text_train_their_head_too(run_command, empty_folder):
    save_run(make_model(), empty_folder / "base")
    rows = [{"text": f"{'xy'[i % 2]} {i}", "label": ("left", "right")[i % 2]} for i in range(32)]
    (empty_folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = ("--max-len", "16", "--train.batch-size", "4", "--epochs", "None", "--steps", "2", "--run-dir", "run")
    status, out, err = run_command(bert, "finetune", "tiny", *rest, *ADAPT, "--data.path", "words.jsonl")
    assert status == 0, err
    others = {name for name in trained(empty_folder / "run") if "lora" not in name}
    assert others == {f"{module}.{x}" for module in ("pooler", "classifier") for x in ("kernel", "bias")}
    status, out, err = run_command(bert, "predict", "run", "words.jsonl", "out.csv")
    assert status == 0, err
    status, out, err = run_command(convert, "run", "alone", "--adapter")
    assert (status, "read back and equal" in out) == (0, True), err


@pytest.mark.slow
def test_retrievers_and_classifiers_of_images_are_adapted(run_command, squares, empty_folder):
    save_run(make_model(pooler=False), empty_folder / "base")
    write_beir(empty_folder / "beir", words=4)
    rest = ("--max-query-len", "24", "--max-doc-len", "32", "--train.batch-size", "4", "--steps", "2")
    status, out, err = run_command(
        bert, "retrieve", "tiny", "--data.path", "beir", *rest, *ADAPT, "--run-dir", "retrieval"
    )
    assert (status, "adapters: " in out) == (0, True), err
    assert all("lora" in name for name in trained(empty_folder / "retrieval"))
    shape = ["--model.d-model", "16", "--model.n-layers", "1", "--model.pattern", "attn/mlp", "--model.mlp.d-ff", "16"]
    images = ["tiny", "--data.path", squares, "--epochs", "1", "--train.batch-size", "16", "--threads", "1"]
    status, _, err = run_command(vit, *images, *shape, "--model.attn.head-dim", "8", "--run-dir", "seen")
    assert status == 0, err
    adapt = ["seen" if flag == "base" else flag for flag in ADAPT]
    status, out, err = run_command(vit, *images, *adapt, "--run-dir", "images")
    assert (status, "adapters: " in out) == (0, True), err
    assert {n for n in trained(empty_folder / "images") if "lora" not in n} == {"classifier.kernel", "classifier.bias"}
    assert len(vit.predict("images", list(np.load(squares / "test.npz")["images"]))) == 8


def test_what_cannot_be_adapted_is_said(run_command):
    status, _, err = run_command(causal_lm, "tiny", "--adapt.rank", "2")
    assert (status, "--adapt.rank 2 without --init: there is no trained model to adapt" in err) == (2, True)
    status, _, err = run_command(vit, "tiny", "--adapt.dora")
    assert (status, "--adapt.dora without --adapt.rank" in err) == (2, True)
