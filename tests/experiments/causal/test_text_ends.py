"""What opens a prompt and what ends a text is what a model's own files say."""

import json
from pathlib import Path

import pytest
import tokenizers as hf
from flax import nnx

import zoo
from experiments import sample
from experiments.causal.text_ends import TextEnds, published_ends
from experiments.data.tokenizers import published_tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")
NAMES = ["<|endoftext|>", "<s>", "<|im_end|>"]


def write_tokenizer(folder, *, opening=False):
    letters = hf.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=280, special_tokens=NAMES, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["a few plain words"], trainer)
    if opening:
        tokenizer.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize(
    ("generation", "config", "closing"),
    [
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 1}, (2, 0)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [2]}, (2,)),
        (None, {"eos_token_id": None}, (0,)),
        (None, {}, (0,)),
    ],
)
def test_a_text_ends_where_the_folder_says(tmp_path, generation, config, closing):
    write_tokenizer(tmp_path / "model")
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / "model" / name).write_text(json.dumps(content))
    ends = published_ends(tmp_path / "model", published_tokenizer(tmp_path / "model"), 280)
    assert ends == TextEnds((), closing)


@pytest.mark.parametrize("said", ["<|im_end|>", [2, 280], -1, True, 1.5])
def test_an_end_that_is_no_id_is_named(tmp_path, said):
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id=.*, expected ids from 0 to 279"):
        published_ends(tmp_path / "model", published_tokenizer(tmp_path / "model"), 280)


def test_a_prompt_begins_with_what_its_tokenizer_puts_first(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "model", opening=True)
    config = zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=tokenizer.get_vocab_size())
    zoo.save_pretrained(zoo.CausalLM(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    ids = sample.load(sample.Config(model="model", prompt="plain words"))[2]
    assert ids == tokenizer.encode("plain words").ids
    assert sample.load(sample.Config(model="model"))[2] == [1]
    as_others_take_it = sample.Config(run_dir=Path("model"), prompt="plain words")
    assert sample.load(as_others_take_it)[2] == ids


def test_sampling_stops_at_any_of_the_ends(tmp_path, run_command):
    tokenizer = write_tokenizer(tmp_path / "model")
    config = zoo.CausalLMConfig(
        d_model=8, n_layers=1, vocab_size=tokenizer.get_vocab_size(), tie_embeddings=False, pad_vocab_multiple=1
    )
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    kernel = model.lm_head.kernel
    kernel[...] = kernel[...] * 0
    zoo.save_pretrained(model, tmp_path / "model", extra={"eos_token_id": [2, 0]})  # of equal logits, 0 is the first
    arguments = ("--model", "model", "--prompt", "a", "--max-new-tokens", 12, "--temperature", 0, "--jsonl")
    status, out, err = run_command(sample, *arguments)
    assert status == 0, err
    said = json.loads(out)
    assert (said["tokens"], said["finished"], said["text"]) == (1, "end", "")
