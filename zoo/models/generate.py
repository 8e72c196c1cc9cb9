"""Text generation: the prompt in one pass, then one jitted loop of single steps.

Prompts of unequal length are padded on the left and masked, so a row's tokens are those that it would get alone.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.serialization import serializable
from zoo.models.causal import CausalLM
from zoo.models.row_images import Images, images_of_rows
from zoo.models.vision_language import VisionLanguageModel
from zoo.stack.option_values import settle

Prompts = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array

# Logits over less than this, or times and over such penalties, would leave the range of float32.
LEAST_TEMPERATURE, LEAST_PENALTY = 1e-6, 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn from what the filters leave.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Examples:
      >>> zoo.Sampling(temperature=0.8, top_p=0.95)
      Sampling(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0, repetition_penalty=1.0)
    """

    temperature: float = 0.0
    """Divides the logits; below 1 sharpens, above 1 flattens; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens until their probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or generated so far; 1 is none."""

    def __post_init__(self):
        settle(self)
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            expected = f"0 for the most likely token, or a finite number of at least {LEAST_TEMPERATURE}"
            raise ValueError(f"temperature={self.temperature}, expected {expected}")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}, expected at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}, expected 0 < top_p <= 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}, expected 0 <= min_p <= 1")
        if not LEAST_PENALTY <= self.repetition_penalty <= 1 / LEAST_PENALTY:
            expected = f"{LEAST_PENALTY} to {1 / LEAST_PENALTY}"
            raise ValueError(f"repetition_penalty={self.repetition_penalty}, expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def filtered(self) -> bool:
        """Whether any filter needs the sorted logits."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def generate(
    model: CausalLM | VisionLanguageModel,
    prompt_ids: Prompts,
    max_new_tokens: int = 20,
    *,
    sampling: Sampling = Sampling(),
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    mask: np.ndarray | jax.Array | None = None,
    images: Images | None = None,
    key: jax.Array | None = None,
) -> Int[Array, "b l"]:
    """Continues prompts.

    Args:
      model: the language model, perhaps one that reads images.
      prompt_ids: a prompt, or a batch of prompts as an array (b, l) or as sequences of unequal length.
      max_new_tokens: tokens to add to every row.
      sampling: how tokens are chosen; greedily by default.
      eos_id: token or tokens that end a row. A row that has ended is filled with pad_id; the loop stops when all have.
      pad_id: fills ended rows, and the left of shorter prompts. None: the first eos_id, or 0.
      mask: (b, l), False where an array of prompts holds padding, at either end.
      images: of a `VisionLanguageModel`, for the places that prompts have for them (`with_places`): (b, i, x, y, c), i
        a row; or for each row a sequence of (x, y, c), of any number. Of a single prompt its images alone.
      key: source of randomness, one key (row i then draws from fold_in(key, i)) or one a row. Needed unless greedy.

    Returns:
      Prompt and new tokens, (b, l + max_new_tokens), shorter prompts padded on the left.

    Raises:
      ValueError: a model that is no causal language model, a text or other things in place of token ids, an empty
        prompt, a token outside the vocabulary, images that do not fill their places, max_new_tokens below 1, more
        positions than the model has, no key to draw with, or a prompt that is traced (parameters may be).

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.generate(model, [[1, 2, 3], [4]], max_new_tokens=5).shape  # the prompts, up to their end, and 5 tokens
      (2, 8)
    """
    prompt, prepared = _prepare(model, prompt_ids, max_new_tokens, sampling, eos_id, pad_id, mask, images, key)
    new = _decode(*prepared, max_new_tokens=max_new_tokens, greedy=sampling.greedy, filtered=sampling.filtered)
    return jnp.concatenate([prompt, new], axis=1)


def generate_stream(
    model: CausalLM | VisionLanguageModel,
    prompt_ids: Prompts,
    max_new_tokens: int = 20,
    *,
    sampling: Sampling = Sampling(),
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    mask: np.ndarray | jax.Array | None = None,
    images: Images | None = None,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts, one array (b,) of new tokens at a time: the same tokens as `generate`, as they come.

    Stops after max_new_tokens, or when every row has ended. Arguments and errors are those of `generate`.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> [tokens.shape for tokens in zoo.generate_stream(model, [[1, 2, 3], [4]], max_new_tokens=2)]
      [(2,), (2,)]
    """
    _, (graphdef, params, decoding, options) = _prepare(
        model, prompt_ids, max_new_tokens, sampling, eos_id, pad_id, mask, images, key
    )
    return _stream(graphdef, params, decoding, options, max_new_tokens, sampling)


def _stream(graphdef, params, decoding, options, max_new_tokens, sampling):
    flags = {"greedy": sampling.greedy, "filtered": sampling.filtered}
    for _ in range(max_new_tokens):
        token, decoding = _advance(graphdef, params, decoding, options, **flags)
        yield np.asarray(token)
        if np.all(decoding.done):
            return


@serializable("zoo.Decoding")
class _Decoding(NamedTuple):
    """What one step of the loop hands to the next."""

    state: tuple
    logits: Float[Array, "b v"]
    seen: Bool[Array, "b v"] | None
    done: Bool[Array, "b"]
    step: Int[Array, ""]


@serializable("zoo.DecodingOptions")
class _Options(NamedTuple):
    """Numbers that may change without compiling again."""

    keys: jax.Array | None
    eos: Int[Array, "n"]
    pad: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def _prepare(model, prompt_ids, max_new_tokens, sampling, eos_id, pad_id, mask, images, key):
    """Checks everything, runs the prompt, and returns (prompt, arguments of the loop)."""
    if not hasattr(model, "extend"):
        raise ValueError(f"model is a {type(model).__name__}, expected a CausalLM: others do not say what comes next")
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}, expected at least 1")
    for name, given in (("prompt_ids", prompt_ids), ("mask", mask)):
        if isinstance(given, jax.core.Tracer):
            raise ValueError(
                f"{name} is traced by a jax transformation, expected known numbers, e.g. a numpy array: they are "
                "checked and padded first. generate compiles its own steps; under jax.jit, loop over the model's extend"
            )
    vocab_size = model.config.vocab_size
    eos = _token_ids([] if eos_id is None else eos_id, vocab_size, "eos_id").reshape(-1).astype(np.int32)
    pad = int(_token_ids(eos[0] if pad_id is None and len(eos) else pad_id or 0, vocab_size, "pad_id"))
    prompt, present = _left_pad(prompt_ids, mask, pad, vocab_size)
    b, length = prompt.shape
    read = {} if images is None else {"images": images_of_rows(images, model, prompt, present)}
    if images is None and isinstance(model, VisionLanguageModel):
        model.check_places((prompt == model.config.image_token_id) & present, None)
    try:
        jax.eval_shape(lambda: model.init_state(b, length + max_new_tokens))
    except ValueError as error:
        what = f"a prompt of {length} tokens and max_new_tokens={max_new_tokens}"
        raise ValueError(f"{what}, {length + max_new_tokens} positions: {error}") from error

    keys = None
    if not sampling.greedy:
        if key is None:
            raise ValueError("key=None, expected a jax.random.key: temperature > 0 draws tokens at random")
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)  # jax.random.PRNGKey still makes the raw kind
        keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
        if keys.shape != (b,):
            raise ValueError(f"key has shape {keys.shape}, expected one key or one for each of {b} rows")
    options = _Options(
        keys,
        jnp.asarray(eos),
        jnp.int32(pad),
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k or vocab_size),
        jnp.float32(sampling.top_p),
        jnp.float32(sampling.min_p),
        jnp.float32(sampling.repetition_penalty),
    )
    graphdef, params = nnx.split(model)
    everywhere = bool(present.all())
    decoding = _prefill(
        graphdef,
        params,
        prompt,
        None if everywhere else present,
        read,
        max_len=length + max_new_tokens,
        penalised=sampling.repetition_penalty != 1,
    )
    return jnp.asarray(prompt), (graphdef, params, decoding, options)


def _token_ids(given, vocab_size: int, name: str) -> np.ndarray:
    """Ids as an array, as they are given: a cast would make tokens of what is none.

    Raises:
      ValueError: they are no integers, or outside of the vocabulary.
    """
    ids = np.asarray(given)
    if ids.size and ids.dtype.kind not in "iu":
        what = "text" if ids.dtype.kind == "U" else "values"
        raise ValueError(f"{name} holds the {what} {str(given)!r:.60}, expected token ids, as a tokenizer gives them")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"{name} holds {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}, the vocabulary")
    return ids


def _left_pad(prompt_ids, mask, pad, vocab_size) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle of prompts flush right, and which of its places are there."""
    if isinstance(prompt_ids, str):
        _token_ids(prompt_ids, vocab_size, "prompt_ids")
    rows = [np.asarray(row) for row in (np.asarray(prompt_ids) if hasattr(prompt_ids, "shape") else prompt_ids)]
    if rows and rows[0].ndim == 0:
        rows = [np.asarray(rows)]  # a single prompt
    if mask is not None:
        masks = np.atleast_2d(np.asarray(mask, bool))
        if [len(row) for row in rows] != [masks.shape[1]] * len(masks):
            raise ValueError(f"mask has shape {np.shape(mask)}, expected that of prompt_ids, {np.shape(prompt_ids)}")
        rows = [row[keep] for row, keep in zip(rows, masks, strict=True)]
    if not rows or min(len(row) for row in rows) == 0:
        raise ValueError("prompt_ids is empty, or a row of it is; start a document with the end-of-text token instead")
    _token_ids(np.concatenate(rows), vocab_size, "prompt_ids")
    length = max(len(row) for row in rows)
    prompt = np.full((len(rows), length), pad, np.int32)
    present = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        prompt[i, length - len(row) :] = row
        present[i, length - len(row) :] = True
    return prompt, present


@functools.partial(jax.jit, static_argnames=("graphdef", "max_len", "penalised"))
def _prefill(graphdef, params, prompt, present, read, *, max_len, penalised):
    model = nnx.merge(graphdef, params)
    b = prompt.shape[0]
    logits, state = model.extend(prompt, model.init_state(b, max_len), mask=present, last_only=True, **read)
    seen = None
    if penalised:
        # Columns beyond the vocabulary take the padding, whose token may not have been seen.
        ids = prompt if present is None else jnp.where(present, prompt, logits.shape[-1])
        seen = jnp.zeros((b, logits.shape[-1]), bool).at[jnp.arange(b)[:, None], ids].set(True, mode="drop")
    return _Decoding(state, logits[:, 0], seen, jnp.zeros((b,), bool), jnp.int32(0))


def _take_step(model, decoding, options, *, greedy, filtered):
    """Chooses a token from the logits and feeds it."""
    logits = jnp.where(jnp.arange(decoding.logits.shape[-1]) < model.config.vocab_size, decoding.logits, -jnp.inf)
    if decoding.seen is not None:
        penalty = options.repetition_penalty
        logits = jnp.where(decoding.seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        logits = logits / options.temperature
        if filtered:
            logits = filter_logits(logits, options.top_k, options.top_p, options.min_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(options.keys, decoding.step)
        token = jax.vmap(jax.random.categorical)(keys, logits)
    token = jnp.where(decoding.done, options.pad, token.astype(jnp.int32))
    done = decoding.done | jnp.isin(token, options.eos)
    seen = decoding.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    logits, state = model.extend(token[:, None], decoding.state)
    return token, _Decoding(state, logits[:, 0], seen, done, decoding.step + 1)


@functools.partial(jax.jit, static_argnames=("graphdef", "greedy", "filtered"))
def _advance(graphdef, params, decoding, options, *, greedy, filtered):
    return _take_step(nnx.merge(graphdef, params), decoding, options, greedy=greedy, filtered=filtered)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "greedy", "filtered"))
def _decode(graphdef, params, decoding, options, *, max_new_tokens, greedy, filtered):
    model = nnx.merge(graphdef, params)

    def unfinished(carry):
        return (carry[1].step < max_new_tokens) & ~jnp.all(carry[1].done)

    def body(carry):
        tokens, decoding = carry
        token, after = _take_step(model, decoding, options, greedy=greedy, filtered=filtered)
        return lax.dynamic_update_index_in_dim(tokens, token, decoding.step, axis=1), after

    tokens = jnp.broadcast_to(options.pad, (decoding.done.shape[0], max_new_tokens))
    return lax.while_loop(unfinished, body, (tokens, decoding))[0]


def filter_logits(
    logits: Float[Array, "b v"], top_k: Int[Array, ""], top_p: Float[Array, ""], min_p: Float[Array, ""]
) -> Float[Array, "b v"]:
    """Sets logits that top-k, then top-p, then min-p leave out to -inf. The most likely token always stays.

    Args:
      logits: after the temperature.
      top_k: keep this many (the vocabulary size keeps all); ties with the last one stay.
      top_p: keep the most likely until their probabilities, renormalised after top-k, reach this.
      min_p: keep those at least this likely, relative to the most likely one.

    Source: Holtzman et al. 2019, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p); order and
      edges as in the logits warpers of transformers.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    k = jnp.clip(top_k, 1, logits.shape[-1])
    ordered = jnp.where(ordered >= ordered[:, k - 1, None], ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # At top_p = 1 rounding alone would cut the tail: the sum reaches 1 before its end.
    kept = ((before < top_p) | (top_p >= 1)) & (ordered > -jnp.inf)
    kept |= jnp.arange(logits.shape[-1]) == 0
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    least = jnp.maximum(least, ordered[:, :1] + jnp.log(min_p))
    return jnp.where(logits >= least, logits, -jnp.inf)
