"""What a language model learns from another one: to guess as that one does."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import zoo
from experiments import causal_lm
from experiments.data.tokenizers import ByteTokenizer, save_tokenizer
from experiments.loop.metrics import read_metrics

IDS = jnp.arange(6)[None]
FLAGS = ["tiny", "--data.path", "my.txt", "--data.seq-len", "16", "--eval-batches", "1", "--train.batch-size", "2"]
FLAGS += ["--prompt=", "--train.no-tensorboard", "--optim.warmup-steps", "0", "--init", "small", "--run-dir", "run"]


def write_model(folder, seed, vocab_size=257):
    config = zoo.CausalLMConfig(d_model=8, n_layers=1, pattern="mamba", vocab_size=vocab_size)
    model = zoo.CausalLM(config, rngs=nnx.Rngs(seed))
    zoo.save_pretrained(model, folder)
    save_tokenizer(ByteTokenizer(), folder)
    return model


@pytest.mark.slow
def test_a_model_that_is_taught_comes_nearer_to_its_teacher(run_command, empty_folder):
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    teacher, student = (write_model(empty_folder / name, seed) for seed, name in enumerate(("large", "small")))
    status, _, err = run_command(causal_lm, *FLAGS, "--teacher", "large", "--steps", "20")
    assert status == 0, err

    def divergence(model):
        log_p, log_q = (jax.nn.log_softmax(m(IDS)[..., :257]) for m in (teacher, model))
        return float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)))

    losses = [record["loss"] for record in read_metrics(empty_folder / "run") if record["split"] == "train"]
    assert losses[-1] < losses[0]
    assert divergence(zoo.from_pretrained(empty_folder / "run")) < divergence(student)
    write_model(empty_folder / "other", 0, vocab_size=300)
    status, _, err = run_command(causal_lm, *FLAGS, "--teacher", "other", "--run-dir", "more")
    assert (status, "--teacher other has 300 tokens, the model that it teaches 257" in err) == (1, True)
