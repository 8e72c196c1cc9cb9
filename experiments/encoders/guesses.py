"""What a masked language model puts in place of hidden words, to be read by people."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

import zoo
from experiments.data.corpus import Corpus
from experiments.data.special_tokens import special_tokens
from experiments.encoders.masking import Masking, MaskingConfig


def guesses(model: zoo.MaskedLM, corpus: Corpus, n: int, *, length: int = 24) -> list[str]:
    """Held-out passages with a few words hidden, and what the model puts there: `the [cat -> dog] sat`."""
    tokenizer, stream = corpus.tokenizer, corpus.validation
    special, masking = special_tokens(tokenizer), Masking(MaskingConfig(mask_share=1, random_share=0), tokenizer)
    lines = []
    for i in range(min(n, stream.n_documents)):
        text = stream.document(i * stream.n_documents // n)[: length - special.around]
        tokens = special.row(text)[None]
        masked = masking(tokens, np.random.default_rng(i), rate=0.15)
        logits = model(jnp.asarray(masked.tokens))[0]
        best = np.asarray(jnp.argmax(logits[:, : model.config.vocab_size], axis=-1))
        chosen = set(masked.positions[masked.weights > 0].tolist())
        words: list[Any] = [
            f"[{tokenizer.decode([token]).strip()} -> {tokenizer.decode([best[at]]).strip()}]"
            if at in chosen
            else token
            for at, token in enumerate(tokens[0])
        ]
        parts: list[str] = []
        first = len(special.frame.opening)
        text_words = words[first : first + len(text)]
        for hidden, group in itertools.groupby(text_words, key=lambda word: isinstance(word, str)):
            run = list(group)
            parts += run if hidden else [tokenizer.decode(run)]
        lines.append("  " + " ".join(" ".join(parts).split()))
    return ["--- hidden -> guessed " + "-" * 38, *lines, "-" * 60] if lines else []
