"""An encoder as sentence-transformers' evaluators and MTEB call one.

    from experiments.retrieval.sentence_transformer import as_sentence_transformer

    model = as_sentence_transformer("runs/retrieve/tiny")        # a run, a published folder, a hub name
    vectors = model.encode(["a text", "another"], normalize_embeddings=True)
    model.similarity(model.encode_query(queries), model.encode_document(documents))
    InformationRetrievalEvaluator(queries, corpus, relevant)(model)

Vectors are NumPy arrays; `convert_to_tensor=True` makes them torch's, where torch is installed. What it is asked for
and cannot do (vectors of tokens, quantised vectors) is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.spatial.distance import cdist

from experiments.data.tokenizers import Tokenizer
from experiments.encoders.load import Pretrained
from experiments.retrieval.embed import embed_texts, longest_text
from experiments.retrieval.embedder import Embedder, as_embedder, load_embedder, pooled
from experiments.retrieval.sentence_modules import SIMILARITIES, SentenceModules, normalized
from zoo.layers.pooling import Pool

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]


def as_sentence_transformer(
    model_or_source: Any, tokenizer: Tokenizer | None = None, *, pool: Pool | None = None
) -> "SentenceEncoder":
    """An encoder behind the interface of a SentenceTransformer.

    Args:
      model_or_source: a run, a published folder or a name on the hub; or what `load_encoder` or `load_embedder` gives;
        or a model, with its tokenizer.
      tokenizer: of a model.
      pool: another pooling than the model's.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no encoder; or a model without a tokenizer.
    """
    if isinstance(model_or_source, str | Path):
        return SentenceEncoder(load_embedder(model_or_source, pool))
    if isinstance(model_or_source, Embedder):
        return SentenceEncoder(model_or_source._replace(model=as_embedder(model_or_source.model, pool)))
    if isinstance(model_or_source, Pretrained):
        model, tokenizer = pooled(model_or_source, pool), model_or_source.tokenizer
    else:
        model = model_or_source
    if tokenizer is None:
        raise ValueError("tokenizer=None with a model, expected the model's tokenizer")
    return SentenceEncoder(Embedder(as_embedder(model, pool), tokenizer, SentenceModules()))


class SentenceEncoder:
    """What evaluators need of a SentenceTransformer.

    Args:
      embedder: a model with a pooling, its tokenizer, and what its folder says.
    """

    def __init__(self, embedder: Embedder):
        self.embedder = embedder
        modules = embedder.modules
        self.prompts: dict[str, str] = dict(modules.prompts)
        self.default_prompt_name = modules.default_prompt
        self.similarity_fn_name: str = modules.similarity
        self.truncate_dim: int | None = None
        self.max_seq_length: int = longest_text(embedder.model.config, embedder.tokenizer, modules)
        self.model_card_data = EvaluationRecord()
        self.device = "cpu"  # where vectors are; the model is where jax has it

    def encode(
        self,
        sentences: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        *,
        inputs: Any = None,
        prompt_type: Any = None,
        **task: Any,
    ) -> Any:
        """The vectors of texts, (n, d) float32, or (d,) of a single one.

        Args:
          sentences, inputs: a text, texts, or batches of them as MTEB has them, {"text": [...]}.
          prompt_name, prompt: what stands before each text. Neither: the default prompt.
          batch_size: texts of the greatest length in a batch; of shorter ones there are more.
          show_progress_bar: whether to show a bar, on a terminal.
          output_value: "sentence_embedding".
          precision: "float32".
          convert_to_numpy: False for a list of torch tensors.
          convert_to_tensor: whether vectors are a torch tensor.
          device: of no meaning here.
          normalize_embeddings: whether vectors have length 1.
          truncate_dim: how many of a vector's first numbers are kept.
          prompt_type: "query" or "document", as MTEB says which prompt is meant.
          **task: what else MTEB says of its tasks, of no meaning here.

        Raises:
          ValueError: no prompt of that name, or an output or precision that there is none of.
        """
        if output_value != "sentence_embedding":
            raise ValueError(f"output_value={output_value!r}, expected 'sentence_embedding'")
        if precision not in (None, "float32"):
            raise ValueError(f"precision={precision!r}, expected 'float32'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, expected at least 1")
        given = inputs if sentences is None else sentences
        single = isinstance(given, str)
        texts = [given] if single else _texts(given)
        if prompt is None and prompt_name is None and prompt_type is not None:
            prompt_name = self._prompt_for(str(getattr(prompt_type, "value", prompt_type)))
        model, tokenizer, modules = self.embedder
        modules = modules._replace(prompts=self.prompts, default_prompt=self.default_prompt_name)
        vectors = embed_texts(
            model,
            tokenizer,
            texts,
            prompt=modules.prompt(prompt, prompt_name),
            modules=modules,
            max_len=self.max_seq_length,
            batch_tokens=batch_size * self.max_seq_length,
            progress=bool(show_progress_bar),
        )
        vectors = vectors[:, : self.truncate_dim if truncate_dim is None else truncate_dim]
        vectors = normalized(vectors) if normalize_embeddings else vectors
        whole: Any = vectors[0] if single else vectors
        if convert_to_numpy and not convert_to_tensor:
            return whole
        whole = _torch().from_numpy(np.ascontiguousarray(whole))
        return whole if convert_to_tensor or single else list(whole)

    def encode_query(self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, **options):
        """`encode` with the prompt called "query", where there is one, and otherwise none."""
        return self.encode(sentences, **self._prompted("query", prompt_name, prompt), **options)

    def encode_document(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, **options
    ):
        """`encode` with the prompt called "document", where there is one, and otherwise none."""
        return self.encode(sentences, **self._prompted("document", prompt_name, prompt), **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """How similar each of some vectors is to each of others, (n, m); torch's where the vectors are."""
        one, other = _array(embeddings1), _array(embeddings2)
        return _like(_SCORES[self._known()](one, other), embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """How similar some vectors are to as many others, (n,); torch's where the vectors are."""
        one, other = _array(embeddings1), _array(embeddings2)
        return _like(_PAIR_SCORES[self._known()](one, other), embeddings1, embeddings2)

    def get_sentence_embedding_dimension(self) -> int:
        """How many numbers a vector has."""
        width = self.embedder.modules.width(self.embedder.model.config.d_model)
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

    get_embedding_dimension = get_sentence_embedding_dimension

    def get_max_seq_length(self) -> int:
        """Most tokens of a text, special ones included."""
        return self.max_seq_length

    def _prompted(self, kind: str, name: str | None, prompt: str | None) -> dict[str, Any]:
        if name is None and prompt is None:
            return {"prompt": self.prompts.get(kind, "")}
        return {"prompt_name": name, "prompt": prompt}

    def _prompt_for(self, kind: str) -> str | None:
        """The name of the prompt for queries, or that for documents under any of its names."""
        names = ("query",) if kind == "query" else (kind, "document", "passage", "corpus")
        return next((name for name in names if name in self.prompts), None)

    def _known(self) -> str:
        if self.similarity_fn_name not in SIMILARITIES:
            said = f"similarity_fn_name={self.similarity_fn_name!r}, expected one of {', '.join(SIMILARITIES)}"
            raise ValueError(said)
        return self.similarity_fn_name


class EvaluationRecord:
    """Where evaluators leave what they have measured, the last of each name."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def set_evaluation_metrics(self, evaluator: Any, metrics: Mapping[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Keeps some metrics."""
        self.metrics |= dict(metrics)


_SCORES = {
    "cosine": lambda x, y: normalized(x) @ normalized(y).T,
    "dot": lambda x, y: x @ y.T,
    "euclidean": lambda x, y: -cdist(x, y, "euclidean").astype(np.float32),
    "manhattan": lambda x, y: -cdist(x, y, "cityblock").astype(np.float32),
}
_PAIR_SCORES = {
    "cosine": lambda x, y: np.sum(normalized(x) * normalized(y), axis=1),
    "dot": lambda x, y: np.sum(x * y, axis=1),
    "euclidean": lambda x, y: -np.linalg.norm(x - y, axis=1),
    "manhattan": lambda x, y: -np.sum(np.abs(x - y), axis=1),
}


def _texts(given: Iterable[Any]) -> list[str]:
    """Texts out of a sequence of them, or of batches {"text": [...]}."""
    texts: list[str] = []
    for one in given:
        if isinstance(one, Mapping):
            found = one["text"]
            texts += [found] if isinstance(found, str) else list(found)
        elif isinstance(one, str):
            texts.append(str(one))
        else:
            raise ValueError(f"sentences has {type(one).__name__}, expected texts")
    return texts


def _array(vectors: Any) -> np.ndarray:
    """Vectors of any kind as (n, d) float32."""
    if isinstance(vectors, Sequence):
        vectors = np.stack([_array(vector)[0] for vector in vectors])
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu().numpy()
    return np.atleast_2d(np.asarray(vectors, np.float32))


def _like(scores: np.ndarray, *vectors: Any) -> Any:
    """Scores as torch's where some of the vectors are."""
    first = [one[0] if isinstance(one, Sequence) and len(one) else one for one in vectors]
    return _torch().from_numpy(np.ascontiguousarray(scores)) if any(hasattr(one, "detach") for one in first) else scores


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("vectors as tensors need torch: pip install torch") from error
    return torch
