"""A small model in a folder, which runs of several kinds start from."""

import pytest
from flax import nnx

import zoo
from experiments.data.tokenizers import ByteTokenizer, save_tokenizer


@pytest.fixture
def base(empty_folder):
    """The model of the folder `base`, and a text."""
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    model = zoo.CausalLM(zoo.CausalLMConfig(d_model=8, n_layers=1, pattern="mamba", vocab_size=257), rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, empty_folder / "base")
    save_tokenizer(ByteTokenizer(), empty_folder / "base")
    return model
