"""Rows of ModernBERT ended in <|endoftext|>, which its tokenizer has too, in place of [SEP]: a cosine of 0.64."""

import jax.numpy as jnp
import numpy as np
import tokenizers as hf
from flax import nnx

import zoo
from experiments.encoders.encoder_inputs import encode
from experiments.encoders.load import load_encoder
from experiments.retrieval.embed import embed_texts
from tests.numerics import jitted, with_random_parameters

NAMES = ["<|padding|>", "<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def test_a_modernbert_s_vector_is_of_the_row_that_ends_in_sep(tmp_path):
    """What users met: vectors that no other library gives, and a tuned classifier with a wrong last token."""
    letters = hf.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=270, special_tokens=NAMES, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["a few plain words"], trainer)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    attn = zoo.AttentionConfig(n_heads=2)
    config = zoo.SequenceClassifierConfig(
        d_model=16,
        n_layers=1,
        pattern="attn/mlp",
        vocab_size=tokenizer.get_vocab_size(),
        attn=attn,
        n_labels=0,
        pool="mean",
    )
    zoo.save_pretrained(with_random_parameters(lambda: zoo.SequenceClassifier(config, rngs=nnx.Rngs(0))), tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    model, tokens, _ = load_encoder(tmp_path)
    right = tokenizer.encode("plain words").ids
    assert encode(tokens, ["plain words"], max_len=64)[0].tokens.tolist() == right
    embed, params = jitted(model, "embed")
    vector = embed_texts(model, tokens, ["plain words"])[0]
    np.testing.assert_allclose(vector, embed(params, jnp.asarray([right]))[0], atol=1e-5)
