"""Masked language modelling as a user runs it: by its command line, on files, with mistakes."""

import dataclasses
import functools
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ssm
import zoo
from experiments import bert
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders import masked_lm
from experiments.encoders.load import load_encoder
from experiments.encoders.masking import Masking, MaskingConfig
from experiments.loop import flags
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model
from tests.numerics import assert_close, with_random_parameters
from zoo.models.build import build

SMALL = shlex.split(
    "pretrain tiny --model.d-model 16 --model.n-layers 1 --model.mlp.d-ff 16 --model.pattern attn/mlp "
    "--model.attn.head-dim 8 --data.tokenizer bytes --data.seq-len 64 --train.batch-size 4 --steps 6 "
    "--train.save-every 2 --train.eval-every 4 --train.log-every 2 --eval-batches 2 --train.no-tensorboard"
)


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def text(tmp_path):
    """A text file of counting sentences."""
    path = tmp_path / "my.txt"
    path.write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    return path


@pytest.fixture
def command(run_command):
    """Runs `python -m experiments.bert ...` in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, bert)


def parameters(folder):
    return jax.tree.map(np.asarray, split_model(load_encoder(folder).model)[1])


def small_model(**options):
    config = zoo.MaskedLMConfig(
        **{"d_model": 16, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": 263, "max_len": 64} | options,
        attn=zoo.AttentionConfig(n_heads=2),
        mlp=zoo.MLPConfig(d_ff=16),
    )
    return with_random_parameters(lambda: build(config, rngs=nnx.Rngs(0)))


def hidden_batch(b=3, length=40, rate=0.3):
    random = np.random.default_rng(0)
    masking = Masking(MaskingConfig(), ByteTokenizer())
    tokens = random.integers(0, 256, (b, length)).astype(np.int32)
    tokens[1, 30:] = special_tokens(ByteTokenizer()).pad
    masked = masking(tokens, random, rate=rate)
    return jax.tree.map(jnp.asarray, masked._asdict() | {"mask": tokens != special_tokens(ByteTokenizer()).pad})


def full_loss(model, batch, rngs):
    """The same loss with logits at every position: what gathering saves."""
    logits = model(batch["tokens"], batch["mask"], rngs=rngs)
    rows = jnp.arange(len(logits))[:, None]
    targets = jnp.zeros(batch["tokens"].shape, jnp.int32).at[rows, batch["positions"]].add(batch["targets"])
    weights = jnp.zeros(batch["tokens"].shape).at[rows, batch["positions"]].add(batch["weights"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nats * weights), jnp.sum(weights)


def test_the_loss_is_that_of_all_logits_at_the_hidden_positions():
    model, batch = small_model(), hidden_batch()
    graphdef, params = nnx.split(model)

    def of(loss):
        return jax.jit(jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), batch, None)[0]))(params)

    (total, gradients), (expected, expected_gradients) = of(masked_lm.masked_loss), of(full_loss)
    assert_close(total, expected)
    assert_close(gradients, expected_gradients, gradient=True)
    sums = masked_lm.masked_sums(model, batch, None)
    assert float(sums.weight) == full_loss(model, batch, None)[1] == 12 + 9 + 12
    logits = np.asarray(model(batch["tokens"], batch["mask"]))
    hits = [
        logits[i, p].argmax() == t
        for i in range(3)
        for p, t, w in zip(batch["positions"][i], batch["targets"][i], batch["weights"][i], strict=True)
        if w
    ]
    assert float(sums.correct) == sum(hits)


def test_a_mixture_of_experts_is_trained_with_its_balance():
    model, batch = small_model(pattern="attn/moe[n_experts=3,d_ff=8,balance_weight=0.5]"), hidden_batch()
    auxiliary = model.run(batch["tokens"], batch["mask"])[1]
    assert masked_lm.masked_loss(model, batch, None).auxiliary == auxiliary > 0.4
    assert masked_lm.masked_loss(small_model(), batch, None).auxiliary is None


def test_gathering_first_saves_memory_and_operations():
    """At 30 % of the positions, and a vocabulary much wider than the model, to about 30 %."""
    model, batch = small_model(vocab_size=8192), hidden_batch(b=8, length=64)
    graphdef, params = nnx.split(model)

    def cost(loss):
        function = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params), batch, None)[0]))
        compiled = function.lower(params).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (flops, memory), (all_flops, all_memory) = cost(masked_lm.masked_loss), cost(full_loss)
    assert flops < 0.4 * all_flops
    assert memory < 0.4 * all_memory


def test_trains_resumes_and_is_loaded(text, tmp_path, command):
    arguments = (*SMALL, "--data.path", text, "--run-dir", "run")
    status, out, err = command(*arguments)
    assert status == 0, err
    assert "packed rows, 100.0% of them text" in out
    assert "guessed right" in out
    assert "hidden -> guessed" in out
    for name in ("config.json", "model.json", "tokenizer.json", "metrics.jsonl", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    held_out = [record for record in read_metrics(tmp_path / "run") if record["split"] == "validation"]
    assert {"loss", "accuracy", "perplexity"} <= held_out[-1].keys()

    status, out, _ = command(*arguments, "--steps", 8)
    assert status == 0
    assert "resumed from step 6" in out
    model, tokenizer, _ = load_encoder("run")
    assert isinstance(model, zoo.MaskedLM)
    assert model.config.vocab_size == special_tokens(tokenizer).vocab_size == 260


@pytest.mark.parametrize("rows", ["packed", "buckets"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(rows, text, tmp_path, command):
    documents = tmp_path / "documents"
    documents.mkdir()
    for i in range(60):
        (documents / f"{i}.txt").write_text(f"Document {i}. " + "word " * (i % 17))
    small = (*SMALL, "--data.path", documents, "--rows", rows, "--data.allow-short-documents")
    assert command(*small, "--run-dir", "whole")[0] == 0
    shutil.copytree("whole", "stopped")
    for step in Checkpoints(tmp_path / "stopped").steps()[1:]:
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(step))
    status, out, err = command(*small, "--run-dir", "stopped")
    assert status == 0, err
    assert "resumed from step 4" in out
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, parameters("stopped"), parameters("whole"))))
    one, other = (
        [record for record in read_metrics(tmp_path / name) if record["split"] == "validation"]
        for name in ("whole", "stopped")
    )
    assert one[-1] == other[-1]


@pytest.mark.slow
def test_goes_on_from_a_run_with_longer_rows(text, tmp_path, command):
    m2 = ("--model.pattern", "m2/monarch", "--model.m2.l-max", 64, "--model.monarch.d-ff", 16)
    positions = ("--model.max-len", 64)
    assert command(*SMALL, *m2, *positions, "--data.path", text, "--run-dir", "short")[0] == 0
    longer = (*SMALL, "--data.path", text, "--init", "short", "--run-dir", "long", "--data.seq-len", 128, "--steps", 2)
    status, out, err = command(*longer)
    assert status == 0, err
    model = load_encoder("long").model
    assert out.startswith("m2/monarch: ")  # the shape of the run, not that of the flags
    assert (model.config.m2.l_max, model.config.max_len) == (128, 128)


def test_every_preset_builds_and_its_config_comes_back_from_json(tmp_path):
    for name, (_, config) in masked_lm.PRESETS.items():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(masked_lm.Config, tmp_path / "config.json") == config
        few = min(config.model.n_layers, 3)  # one of each kind
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 512, n_layers=few)
        nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(0)))
        masked_lm.check_lengths(model, config.data.seq_len)
        assert name in ("tiny", "small") or config.model.vocab_size == config.data.bpe_vocab_size


def test_the_small_encoders_are_of_one_size_whatever_the_mixer():
    from experiments.loop.model_size import count_params

    base = dataclasses.replace(masked_lm.PRESETS["small"][1].model, vocab_size=8192)
    patterns = ("m2/monarch", "mamba", "mamba2", "attn/mlp")
    sizes = [count_params(dataclasses.replace(base, pattern=pattern)) for pattern in patterns]
    assert max(sizes) < 1.005 * min(sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "missing.txt"], "missing.txt"),
        (["--model.pattern", "m2/monarch", "--model.m2.l-max", 32], "--data.seq-len 64 with --model.m2.l-max 32"),
        (["--model.max-len", 32], "--data.seq-len 64 with --model.max-len 32: there are no more positions"),
        (
            ["--model.vocab-size", 100],
            "--model.vocab-size 100 is smaller than the vocabulary",
        ),
        (["--masking.rate", 0], "rate=0.0, expected 0 < rate < 1"),
        (["--data.seq-len", 2], "seq_len=2, expected at least 3"),
        (["--init", "nowhere"], "nowhere is neither a folder nor a name on the hub"),
        (["--model.pattern", "attn[windw=3]"], "windw"),
        (["--rows", "paked"], "paked"),
        (["--run-dir", "."], "--run-dir . is not empty and holds no run"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, text, tmp_path, command):
    status, _, err = command(*SMALL, "--data.path", text, "--run-dir", "run", *arguments)
    assert status != 0
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "unknown command 'pretain', did you mean 'pretrain'?"),
        (["pretrain", "tinny"], "unknown preset 'tinny', did you mean 'tiny'?"),
        (["pretrain", "tiny", "--masking.rat", "0.3"], "or --masking.rate?"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(arguments, message, command):
    status, _, err = command(*arguments)
    assert status in (1, 2)
    assert message in err


def test_help_names_the_commands(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in bert.COMMANDS:
        assert f"bert {name}" in out
    assert command("--help") == command()


def test_an_init_of_another_experiment_is_refused(tmp_path):
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"other is a run of another experiment: there is no model.json in it"):
        load_encoder(tmp_path / "other")


def test_bidirectional_state_spaces_and_monarch_mixers_by_one_flag():
    config = masked_lm.small_encoder(16, 1, 64)
    for pattern, kind in (("mamba2", ssm.Bidirectional), ("m2/monarch", object)):
        model = dataclasses.replace(config, pattern=pattern, vocab_size=64)
        mixer = nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(0))).encoder.backbone.layers[0].mixer
        assert isinstance(mixer, kind)
        assert not mixer.causal
