"""Runs that train in few bits: floats in their checkpoints, codes in what they evaluate, load as and hand on."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import bert, causal_lm, convert, sample, vit
from experiments.loop import flags
from experiments.loop.few_bits import QuantizeConfig, in_few_bits
from experiments.loop.metrics import last_evaluation
from tests.numerics import with_random_parameters
from zoo.published.checkpoint_files import read_params
from zoo.published.run_folder import find_checkpoint
from zoo.reuse.quantize import quantized_weights

IDS = jnp.arange(6)[None]
BITS = ["--quantize.bits", "4", "--quantize.group-size", "8", "--train.no-tensorboard"]
CAUSAL = ["tiny", "--data.path", "my.txt", "--data.tokenizer", "bytes", "--data.seq-len", "16", "--eval-batches", "1"]
CAUSAL += ["--train.batch-size", "2", "--train.eval-every", "2", "--train.save-every", "2", "--prompt=l"]
CAUSAL += ["--optim.schedule", "wsd", "--optim.decay-fraction", "0", "--optim.warmup-steps", "0", "--init", "base"]


def params(model):
    return {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_checkpoints_hold_floats_and_the_run_is_the_model_that_was_evaluated(base, run_command, empty_folder):
    status, out, err = run_command(causal_lm, *CAUSAL, *BITS, "--steps", "2", "--run-dir", "run")
    assert status == 0, err
    assert "in 4 bits: 928 of 3,424 parameters" in out  # 8 x 32, 16 x 33, 1 x 16 and 16 x 8
    small, floats = zoo.from_pretrained("run"), zoo.from_pretrained("run", masters=True)
    names = {f"backbone.layers.0.mixer.{m}.kernel" for m in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    assert set(quantized_weights(small)) == names
    assert params(floats).keys() == read_params(find_checkpoint(empty_folder / "run")).keys() == params(base).keys()
    again = zoo.quantize(floats, bits=4, group_size=8)
    assert np.array_equal(small(IDS), again(IDS))
    assert not np.array_equal(small(IDS), floats(IDS))
    assert all(not np.array_equal(params(floats)[name], params(base)[name]) for name in names)
    # What was evaluated is what the folder gives.
    config = flags.load_config(causal_lm.Config, empty_folder / "run/config.json")
    corpus = causal_lm.load_corpus(causal_lm.start_from(config, None, ())[0].data)
    task = causal_lm.make_task(causal_lm.fit_vocabulary(config, corpus.tokenizer), corpus)
    assert last_evaluation("run")["loss"] == pytest.approx(task.evaluate(small)["loss"], rel=1e-6)
    assert last_evaluation("run")["loss"] != pytest.approx(task.evaluate(floats)["loss"], rel=1e-5)
    # And what was trained, of weights that a loss depends on more.
    few = in_few_bits(task, config.quantize, empty_folder / "run", seed=0, fresh=True).task
    batch = jax.tree.map(jnp.asarray, next(task.batches))
    floats = with_random_parameters(lambda: zoo.CausalLM(base.config, rngs=nnx.Rngs(0)))
    small = zoo.quantize(floats, bits=4, group_size=8)
    trained, read, plain = few.loss(floats, batch, None), task.loss(small, batch, None), task.loss(floats, batch, None)
    assert float(trained.total) == pytest.approx(float(read.total), rel=1e-5)
    assert float(trained.total) != pytest.approx(float(plain.total), rel=1e-3)


@pytest.mark.slow
def test_a_run_resumes_bitwise_samples_and_converts(base, run_command, empty_folder):
    for steps, name in (("4", "straight"), ("2", "halves")):
        status, _, err = run_command(causal_lm, *CAUSAL, *BITS, "--steps", steps, "--run-dir", name)
        assert status == 0, err
    shutil.rmtree("base")  # which a run that goes on has no need of
    status, out, err = run_command(causal_lm, *CAUSAL, *BITS, "--steps", "4", "--run-dir", "halves")
    assert (status, "resumed from step 2" in out) == (0, True), err
    halves, straight = (read_params(find_checkpoint(empty_folder / name)) for name in ("halves", "straight"))
    assert all(np.array_equal(halves[name], straight[name]) for name in straight)
    status, _, err = run_command(sample, "halves", "--prompt", "line", "--max-new-tokens", "3")
    assert status == 0, err
    status, said, err = run_command(convert, "halves", "out")
    assert (status, "3,424 parameters" in said) == (0, True), err
    assert "--layout official: not this model, backbone.layers.0.mixer.dt_proj.kernel is quantised" in said
    out = zoo.from_pretrained("out")
    assert np.array_equal(out(IDS), zoo.from_pretrained("halves")(IDS))
    status, _, err = run_command(convert, "halves", "half", "--dtype", "bfloat16")
    assert status == 0, err
    codes = [next(iter(quantized_weights(m).values())).weight.codes[...] for m in (out, zoo.from_pretrained("half"))]
    assert np.array_equal(*codes)
    status, _, err = run_command(convert, "halves", "theirs", "--layout", "official")
    assert (status, "is quantised: layout='official' has plain weights" in err) == (1, True)


@pytest.mark.slow
def test_a_run_starts_from_the_floats_of_another_or_from_those_of_its_codes(base, run_command, empty_folder):
    status, _, err = run_command(causal_lm, *CAUSAL, *BITS, "--steps", "2", "--run-dir", "run")
    assert status == 0, err
    config = causal_lm.Config(init="run", quantize=QuantizeConfig(bits=2))
    started = causal_lm.start_from(config, None, ())[1]
    floats = params(zoo.from_pretrained("run", masters=True))
    assert all(np.array_equal(x, floats[name]) for name, x in params(started).items())
    onwards = ["run" if flag == "base" else flag for flag in CAUSAL]
    status, out, err = run_command(causal_lm, *onwards, "--steps", "1", "--run-dir", "next")
    assert (status, "--init run is in few bits: floats of the same values are trained" in out) == (0, True), err
    assert params(zoo.from_pretrained("next")).keys() == floats.keys()


def test_what_cannot_be_trained_in_few_bits_is_said(base, run_command, empty_folder):
    status, _, err = run_command(causal_lm, "tiny", "--init", "base", "--adapt.rank", "2", "--quantize.bits", "4")
    assert (status, "--quantize.bits 4 with --adapt.rank 2: adapters leave" in err) == (2, True)
    status, _, err = run_command(causal_lm, "tiny", "--quantize.embeddings")
    assert (status, "--quantize.embeddings without --quantize.bits" in err) == (2, True)
    status, _, err = run_command(causal_lm, *CAUSAL, *BITS, "--quantize.targets", "in_prj", "--run-dir", "run")
    assert (status, "targets='in_prj' matches nothing" in err) == (1, True)
    assert not (empty_folder / "run").exists()
    zoo.save_pretrained(zoo.quantize(base, bits=4), empty_folder / "base")
    started = causal_lm.start_from(causal_lm.Config(init=str(empty_folder / "base")), None, ())[1]
    assert quantized_weights(started)


@pytest.mark.slow
def test_encoders_and_classifiers_are_trained_in_few_bits(run_command, squares, empty_folder):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    shape = ["--model.d-model", "16", "--model.n-layers", "1", "--model.pattern", "attn/mlp", "--model.mlp.d-ff", "16"]
    shape += ["--model.attn.head-dim", "8"]
    some = ["--train.batch-size", "4", "--steps", "2", *BITS]
    text = ["--data.path", "my.txt", "--data.bpe-vocab-size", "300", "--data.seq-len", "16", "--eval-batches", "1"]
    status, out, err = run_command(bert, "pretrain", "tiny", *text, *shape, *some, "--run-dir", "words")
    assert (status, "in 4 bits: " in out) == (0, True), err
    assert quantized_weights(zoo.from_pretrained("words"))
    rows = [{"text": f"{'xy'[i % 2]} {i}", "label": ("left", "right")[i % 2]} for i in range(32)]
    (empty_folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = ["--data.path", "words.jsonl", "--max-len", "16", "--epochs", "None", "--init", "words", "--run-dir", "run"]
    status, _, err = run_command(bert, "finetune", "tiny", *tuned, *some)
    assert status == 0, err
    status, _, err = run_command(bert, "finetune", "tiny", *tuned, *some, "--steps", "3")
    assert status == 0, err
    status, _, err = run_command(bert, "predict", "run", "words.jsonl", "out.csv")
    assert status == 0, err
    images = ["tiny", "--data.path", squares, "--epochs", "1", "--train.batch-size", "16", "--threads", "1", *shape]
    status, _, err = run_command(vit, *images, *BITS, "--run-dir", "seen")
    assert status == 0, err
    assert quantized_weights(zoo.from_pretrained("seen"))
    assert len(vit.predict("seen", list(np.load(squares / "test.npz")["images"]))) == 8
    status, _, err = run_command(vit, *images, *BITS, "--init", "seen", "--run-dir", "more")
    assert status == 0, err
