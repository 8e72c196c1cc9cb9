"""Models made of others by commands: what is in the folder, and what cannot be made."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import causal_lm, convert, reuse, sample, score
from experiments.causal.load import load_causal
from experiments.data.corpus import DataConfig
from experiments.data.tokenizers import ByteTokenizer, save_tokenizer, train_bpe
from experiments.reusing import latency
from experiments.reusing.calibrating import text_for
from experiments.reusing.gates import GatesConfig, trained_scores
from tests.places import PUBLISHED
from tests.zoo.reuse.models import IDS, causal
from tests.zoo.reuse.test_adapt import moved
from zoo.reuse.quantize import quantized_weights


@pytest.fixture
def folders(empty_folder):
    """A model and two tunes of it."""
    model = causal("mamba/mlp")
    for seed, name in enumerate(("base", "one", "two")):
        zoo.save_pretrained(moved(model, seed) if seed else model, empty_folder / name)
    return model


def numbers(folder):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.state(zoo.from_pretrained(folder), nnx.Param))])


def test_tunes_become_one(folders, run_command):
    tuned = ("--tuned", "one", "two")
    status, out, err = run_command(reuse, "merge", "base", "out", *tuned, "--method", "task_arithmetic")
    assert status == 0, err
    assert "2 tunes of base -> out" in out
    np.testing.assert_allclose(numbers("out"), (numbers("one") + numbers("two")) / 2, atol=1e-6)
    status, _, err = run_command(reuse, "merge", "base", "out", *tuned)
    assert (status, err.strip()) == (1, "error: out is not empty; choose another folder")
    status, _, err = run_command(reuse, "merge", "base", "other", *tuned, "--weights", "1", "2", "3")
    assert status == 1
    assert "expected one for each of the 2 models" in err


@pytest.mark.slow
def test_a_model_grows_and_comes_back(folders, run_command):
    status, out, err = run_command(reuse, "grow", "base", "large", "--d-model", "16", "--n-layers", "2")
    assert status == 0, err
    assert "d_model=16, n_layers=2, 'mamba/mlp'" in out
    assert jnp.allclose(zoo.from_pretrained("large")(IDS), folders(IDS), atol=1e-5)
    status, out, err = run_command(reuse, "coalesce", "large", "small", "--d-model", "8")
    assert status == 0, err
    status, _, err = run_command(
        reuse, "grow", "small", "again", "--d-model", "16", "--into", "large", "--alpha", "0.25"
    )
    assert status == 0, err
    np.testing.assert_allclose(numbers("again"), numbers("large"), atol=1e-6)
    status, _, err = run_command(reuse, "grow", "base", "other", "--d-model", "4")
    assert (status, err.strip()) == (1, "error: d_model=4, expected at least the model's 8")


@pytest.mark.slow
def test_weights_become_few_bits(folders, run_command):
    status, out, err = run_command(reuse, "quantize", "base", "out", "--bits", "4", "--group-size", "8", "--embeddings")
    assert status == 0, err
    assert "MB of weights are" in out
    small = zoo.from_pretrained("out")
    assert {weight.weight.bits for weight in quantized_weights(small).values()} == {4, 8}
    expected = zoo.quantize(folders, bits=4, group_size=8, embeddings=True)
    assert jnp.array_equal(small(IDS), expected(IDS))


@pytest.mark.slow
def test_an_adapter_is_folded_in_and_what_lies_beside_a_model_goes_along(folders, run_command, empty_folder):
    source = PUBLISHED / "llama_tied"
    model = zoo.from_pretrained(source)
    tuned = moved(zoo.add_lora(model, rank=1, rngs=nnx.Rngs(0)))
    zoo.save_adapter(tuned, "adapter")
    status, _, err = run_command(reuse, "adapt", source, "out", "--adapter", "adapter")
    assert status == 0, err
    assert jnp.allclose(zoo.from_pretrained("out")(IDS), tuned(IDS), atol=1e-5)
    assert (empty_folder / "out/README.md").is_file()
    status, _, err = run_command(reuse, "adapt", "base", "other", "--adapter", "adapter")
    assert status == 1
    assert "is no adapter of a map of this model" in err
    assert not (empty_folder / "other").exists()


@pytest.mark.slow
def test_what_is_needed_least_goes(empty_folder, run_command):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(500)))
    config = zoo.CausalLMConfig(d_model=8, n_layers=2, pattern="mamba/mlp", vocab_size=257)
    zoo.save_pretrained(zoo.CausalLM(config, rngs=nnx.Rngs(0)), "base")
    save_tokenizer(ByteTokenizer(), empty_folder / "base")
    text = ("--data.path", "my.txt", "--data.seq-len", "16", "--calibration.batches", "2")
    status, out, err = run_command(reuse, "prune", "base", "small", *text, "--n-heads", "8", "--n-layers", "1")
    assert status == 0, err
    assert "perplexity of held-out text" in out
    small = zoo.from_pretrained("small")
    assert (small.config.n_layers, small.config.mamba.expand) == (1, 1.0)
    assert (empty_folder / "small/tokenizer.json").is_file()
    status, out, err = run_command(reuse, "factorize", "base", "other", *text, "--n-blocks", "2")
    assert status == 0, err
    assert zoo.from_pretrained("other").config.pattern == "mamba/monarch*2"
    status, out, err = run_command(reuse, "quantize", "base", "few", *text, "--mixed-mb", "0.003", "--group-size", "8")
    assert status == 0, err
    assert len({weight.weight.bits for weight in quantized_weights(zoo.from_pretrained("few")).values()}) > 1


@pytest.mark.slow
def test_tokens_that_are_seldom_go_with_the_tokenizer(empty_folder, run_command):
    """The folder is one like any other: its text is the same in fewer tokens, of which the logits are as they were."""
    text = "".join(f"line {i} says {i * i % 97}, and goes on to say: nothing.\n" for i in range(300))
    (empty_folder / "my.txt").write_text(text)
    tokenizer = train_bpe([text], 330)
    model = causal("mamba/mlp")
    config = dataclasses.replace(model.config, vocab_size=tokenizer.vocab_size, pad_vocab_multiple=8)
    base = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    zoo.save_pretrained(base, "base", extra={"eos_token_id": tokenizer.eot})
    save_tokenizer(tokenizer, empty_folder / "base")
    options = ("--data.path", "my.txt", "--data.seq-len", "16", "--calibration.batches", "1")
    status, out, err = run_command(reuse, "prune", "base", "few", *options, "--vocabulary", "280")
    assert status == 0, err
    assert "bits per byte of held-out text" in out
    loaded = load_causal("few")
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == 280
    names = {token: i for token, i in loaded.tokenizer.vocabulary().items()}
    before = jnp.asarray([tokenizer.vocabulary()[token] for token in sorted(names, key=names.get)])
    ids = loaded.tokenizer.encode(text[:200])
    assert loaded.tokenizer.decode(ids) == text[:200]
    expected = base(before[ids][None])[..., before]
    np.testing.assert_allclose(loaded.model(jnp.asarray(ids)[None]), expected, atol=1e-5)
    said = json.loads((empty_folder / "few/config.json").read_text())
    assert said["eos_token_id"] == loaded.tokenizer.eot == names["<|endoftext|>"]
    for n, message in (("100", "vocabulary=100, expected 257 to "), ("9999", "vocabulary=9999, expected 257 to ")):
        status, _, err = run_command(reuse, "prune", "base", "other", *options, "--vocabulary", n)
        assert status == 1
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1
        assert not (empty_folder / "other").exists()


@pytest.mark.slow
def test_a_model_of_fewer_tokens_is_trained_scored_sampled_and_converted(empty_folder, run_command):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(500)))
    text = ("--data.path", "my.txt", "--data.seq-len", "16")
    shape = ("--model.d-model", "8", "--model.n-layers", "1", "--train.batch-size", "2", "--steps", "2")
    bpe = ("--data.tokenizer", "bpe", "--data.bpe-vocab-size", "330")
    status, _, err = run_command(causal_lm, "tiny", *text, *bpe, *shape, "--run-dir", "run")
    assert status == 0, err
    for step in (
        (reuse, "prune", "run", "few", *text, "--calibration.batches", "1", "--vocabulary", "290"),
        (causal_lm, "tiny", *text, "--init", "few", "--teacher", "few", *shape[4:], "--run-dir", "taught"),
        (sample, "taught", "--prompt", "line", "--max-new-tokens", "3"),
        (score, "few", "my.txt"),
        (convert, "few", "out"),
        (reuse, "prune", "out", "fewer", *text, "--calibration.batches", "1", "--vocabulary", "270"),
    ):
        status, _, err = run_command(*step)
        assert status == 0, (step, err)
    assert load_causal("fewer").tokenizer.vocab_size == 270
    assert load_causal("taught").tokenizer.vocab_size == 290


@pytest.mark.slow
def test_units_go_by_gates(empty_folder, run_command):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(500)))
    config = zoo.CausalLMConfig(d_model=8, n_layers=1, pattern="mamba/mlp", vocab_size=257)
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, "base")
    save_tokenizer(ByteTokenizer(), empty_folder / "base")
    text = ("--data.path", "my.txt", "--data.seq-len", "16", "--calibration.batches", "2")
    gates = ("--gates.steps", "30", "--gates.batch-size", "2")
    status, out, err = run_command(reuse, "prune", "base", "small", *text, "--d-ff", "8", *gates)
    assert status == 0, err
    assert "step    30/30" in out
    small = zoo.from_pretrained("small")
    assert small.config.mlp.d_ff == 8
    scores = trained_scores(
        model, text_for("base", DataConfig(path="my.txt", seq_len=16)), 16, GatesConfig(steps=30, batch_size=2), d_ff=8
    )
    kept = np.sort(np.argsort(-scores["backbone.layers.0.mlp.d_ff"], kind="stable")[:8])
    up = model.backbone.layers[0].mlp.up_proj.kernel[...]
    assert jnp.array_equal(small.backbone.layers[0].mlp.up_proj.kernel[...], up[:, kept])
    status, _, err = run_command(reuse, "prune", "base", "other", *text, "--d-model", "4", *gates)
    assert (status, err.strip().count("\n")) == (2, 0)
    assert "--gates.steps 30 without --d-ff or --n-heads: no units go by gates" in err


def test_a_table_of_times_is_measured_and_says_how_fast_a_model_can_be(tmp_path, unchecked):
    config = zoo.CausalLMConfig(d_model=8, n_layers=2, pattern="mamba/mlp", vocab_size=11, mlp=zoo.MLPConfig(d_ff=16))
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    found = latency.measure(model, latency.Config("", tmp_path, sizes=4, seq_len=4, turns=2))
    assert list(found.times) == [0, 4, 8, 12, 16]
    assert found.times[0] == 0
    assert min(found.times[n] for n in (4, 8, 12, 16)) > 0
    # Twice 4 ms of channel mixers, and 2 ms: in 6 ms there is half of the time for them, in 2 ms none.
    table = latency.Latency({0: 0.0, 4: 1.0, 8: 2.0, 16: 4.0}, 2.0)
    sizes = latency.sizes_for(model, [{"ids": IDS}], table, 10 / 6.01)
    assert sum(table.times[n] for n in sizes) <= 10 / (10 / 6.01) - 2
    assert sum(sizes) > 8
    for speedup, message in ((1.0, "expected more than 1, and less than the 5 of"), (5.0, "--speedup 5, expected")):
        with pytest.raises(ValueError, match=message):
            latency.sizes_for(model, [{"ids": IDS}], table, speedup)
    with pytest.raises(ValueError, match="no time of 16 hidden channels"):
        latency.sizes_for(model, [{"ids": IDS}], latency.Latency({8: 1.0}, 2.0), 2.0)
    (tmp_path / "table.json").write_text('{"times": [1]}')
    with pytest.raises(ValueError, match=r"table\.json holds no table of times"):
        latency.read_latency(tmp_path / "table.json")
    with pytest.raises(FileNotFoundError, match=r"--latency .*none\.json, expected a file that"):
        latency.read_latency(tmp_path / "none.json")
    with pytest.raises(ValueError, match="mixers of one size, there are none"):
        latency.measure(zoo.CausalLM(zoo.CausalLMConfig(vocab_size=8, d_model=8, n_layers=1), rngs=0), config)


@pytest.mark.slow
def test_layers_of_unequal_width_by_a_measured_table(empty_folder, run_command):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(500)))
    config = zoo.CausalLMConfig(d_model=8, n_layers=2, pattern="mamba/mlp", vocab_size=257)
    zoo.save_pretrained(zoo.CausalLM(config, rngs=nnx.Rngs(0)), "base")
    save_tokenizer(ByteTokenizer(), empty_folder / "base")
    status, out, err = run_command(reuse, "latency", "base", "table.json", "--sizes", "4", "--seq-len", "16")
    assert status == 0, err
    assert "the rest" in out
    said = json.loads((empty_folder / "table.json").read_text())
    assert (said["unit"], said["seq_len"], list(said["times"])) == ("ms", 16, ["0", "8", "16", "24", "32"])
    (empty_folder / "table.json").write_text(
        json.dumps(said | {"rest": 1.0, "times": {"0": 0, "8": 1, "16": 2, "32": 4}})
    )
    text = ("--data.path", "my.txt", "--data.seq-len", "16", "--calibration.batches", "1")
    fast = ("--speedup", "1.7", "--latency", "table.json")
    status, out, err = run_command(reuse, "prune", "base", "small", *text, *fast)
    assert status == 0, err
    sizes = [int(n) for n in out.split("hidden channels of each layer: ")[1].splitlines()[0].split(", ")]
    assert 0 < sum(sizes) <= 32
    status, _, err = run_command(causal_lm, "tiny", *text[:4], "--init", "small", "--steps", "2", "--run-dir", "run")
    assert status == 0, err
    status, _, err = run_command(reuse, "prune", "base", "other", *text, *fast[:2])
    assert status == 2
    assert "--speedup and --latency go together" in err
