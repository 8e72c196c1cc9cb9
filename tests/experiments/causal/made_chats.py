"""A folder of a causal language model that has a chat template, without any training."""

import json
from pathlib import Path

import tokenizers as hf
from flax import nnx

import zoo

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
ENDS = [3, 0]


def write_chat_model(folder: Path) -> hf.Tokenizer:
    """A tiny model in our own layout with a byte-level BPE, a template, and two ids that end a text; its tokenizer."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    letters = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["a few plain words"], trainer)
    model = zoo.CausalLM(
        zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=tokenizer.get_vocab_size()), rngs=nnx.Rngs(0)
    )
    zoo.save_pretrained(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return tokenizer
