"""What a folder of sentence-transformers says of a text's vector: prompts, the longest text, and what follows pooling.

    modules.json                          Transformer, Pooling, and any of Dense and Normalize behind it
    1_Pooling/config.json                 how a row is pooled, and whether its prompt is
    sentence_bert_config.json             max_seq_length, do_lower_case
    config_sentence_transformers.json     prompts by name, the one that is taken unasked, truncate_dim, the similarity

How a row is pooled is read where the model is (`zoo.from_pretrained`); the rest is here. What there is no equal for is
refused by name.

Source: the files that sentence-transformers 2 to 6 write.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf
from jaxtyping import Float

from zoo.published.json_files import parse_json
from zoo.published.plain_weights import copied, require_floating
from zoo.published.weight_files import open_weights

MODULES_FILE = "modules.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
CONFIG_FILE = "config_sentence_transformers.json"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_ACTIVATIONS: dict[str, Callable] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
}
Vectors = Float[np.ndarray, "n d"]


class Dense(NamedTuple):
    """A linear map behind the pooling: act(W x + b), and x or R x besides where it has a residual."""

    weight: np.ndarray
    """(out, in), as torch has it."""
    bias: np.ndarray | None
    activation: str
    residual: np.ndarray | None
    """(out, in); None where there is none. The unit matrix where x itself is added."""

    def __call__(self, x: Vectors) -> Vectors:
        """The vectors behind it."""
        y = x @ self.weight.T + (0 if self.bias is None else self.bias)
        y = np.asarray(_ACTIVATIONS[self.activation](y), np.float32)
        return y if self.residual is None else y + x @ self.residual.T


class Normalize(NamedTuple):
    """Scales vectors to length 1."""

    def __call__(self, x: Vectors) -> Vectors:
        """The vectors, of length 1; one of length 0 stays."""
        return normalized(x)


class SentenceModules(NamedTuple):
    """How texts become vectors, besides what the model itself does."""

    behind: tuple[Dense | Normalize, ...] = ()
    """What vectors go through behind the pooling, in this order."""
    include_prompt: bool = True
    """Whether a prompt's tokens are pooled with the text's."""
    max_length: int | None = None
    """Most tokens of a text, its prompt and special tokens included. None: nothing says so."""
    lower_case: bool = False
    """Whether texts are lower-cased before the tokenizer reads them."""
    prompts: Mapping[str, str] = {}
    """What stands before a text, by name."""
    default_prompt: str | None = None
    """The name of the prompt that is taken where none is asked for."""
    truncate: int | None = None
    """How many of a vector's first numbers are kept."""
    similarity: str = "cosine"
    """Of two vectors."""

    def prompt(self, prompt: str | None = None, name: str | None = None) -> str:
        """The prompt that is meant: itself, or the one of a name, or else the default.

        Raises:
          ValueError: there is none of that name.
        """
        if prompt is not None:
            return prompt
        if name is None:
            return self.prompts.get(self.default_prompt or "", "")
        if name not in self.prompts:
            known = f"one of {', '.join(self.prompts)}" if self.prompts else "None: the model has no prompts"
            raise ValueError(f"prompt_name={name!r}, expected {known}")
        return self.prompts[name]

    def read(self, texts: list[str], prompt: str) -> list[str]:
        """Texts as the tokenizer gets them."""
        texts = [prompt + text for text in texts]
        return [hf.normalizers.Lowercase().normalize_str(text) for text in texts] if self.lower_case else texts

    def finish(self, x: Vectors) -> Vectors:
        """A text's vectors out of what pooling gives."""
        for module in self.behind:
            x = module(x)
        return x[:, : self.truncate]

    def width(self, width: int) -> int:
        """How many numbers a vector has, of a model that pools to `width`."""
        for module in self.behind:
            width = module.weight.shape[0] if isinstance(module, Dense) else width
        return width if self.truncate is None else min(width, self.truncate)


def read_modules(folder: Path) -> SentenceModules:
    """What a folder says; the defaults where it is none of sentence-transformers.

    Raises:
      ValueError: a module or an option that there is none for here: names the file and what it says.
    """
    listed = _read(folder / MODULES_FILE, [])
    behind: list[Dense | Normalize] = []
    include_prompt = True
    pooled = False
    for module in listed:
        for name in ("type", "path"):
            if not isinstance(module, dict) or not isinstance(module.get(name), str):
                raise ValueError(f"{folder / MODULES_FILE}: {module!r:.60}, expected a module with its type and path")
        kind, place = module["type"].rpartition(".")[2], folder / module["path"]
        if kind == "Pooling" and not pooled:
            pooled, include_prompt = True, _read(place / "config.json", {}).get("include_prompt", True)
        elif kind == "Dense" and pooled:
            behind.append(_read_dense(place))
        elif kind == "Normalize" and pooled:
            behind.append(Normalize())
        elif not (kind == "Transformer" and not pooled and not module["path"]):
            said = f"a module of type {kind} at {module['path'] or 'the top'!r}"
            raise ValueError(
                f"{folder / MODULES_FILE}: {said} is not supported, only Transformer at the top, Pooling, and then "
                "Dense and Normalize"
            )
    transformer, config = _read(folder / TRANSFORMER_FILE, {}), _read(folder / CONFIG_FILE, {})
    if (task := transformer.get("transformer_task", "feature-extraction")) != "feature-extraction":
        raise ValueError(f"{folder / TRANSFORMER_FILE}: transformer_task={task!r}, expected 'feature-extraction'")
    if (kind := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise ValueError(f"{folder / CONFIG_FILE}: model_type={kind!r}, expected 'SentenceTransformer'")
    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"{folder / CONFIG_FILE}: similarity_fn_name={similarity!r}, expected one of {', '.join(SIMILARITIES)}"
        )
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{folder / CONFIG_FILE}: prompts={prompts!r:.60}, expected texts by their names")
    return SentenceModules(
        behind=tuple(behind),
        include_prompt=include_prompt,
        max_length=_count(folder / TRANSFORMER_FILE, transformer, "max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case")),
        prompts={name: text for name, text in prompts.items() if text is not None},
        default_prompt=config.get("default_prompt_name"),
        truncate=_count(folder / CONFIG_FILE, config, "truncate_dim"),
        similarity=similarity,
    )


def _count(path: Path, said: Mapping[str, Any], name: str) -> int | None:
    """A field that counts something, or None."""
    value = said.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{path}: {name}={value!r}, expected null or at least 1")
    return value


def normalized(vectors: Vectors) -> Vectors:
    """Vectors of length 1; one of length 0 stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _read_dense(folder: Path) -> Dense:
    said = _read(folder / "config.json", {})
    activation = str(said.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    if name not in _ACTIVATIONS or not activation.startswith("torch."):
        raise ValueError(
            f"{folder / 'config.json'}: activation_function={activation!r} is not supported, only torch.nn's "
            f"{', '.join(_ACTIVATIONS)}"
        )
    for field in ("module_input_name", "module_output_name"):
        if (where := said.get(field) or "sentence_embedding") != "sentence_embedding":
            raise ValueError(f"{folder / 'config.json'}: {field}={where!r}, expected 'sentence_embedding'")
    there = open_weights(folder)
    require_floating(folder, there, there)
    tensors = {
        key: copied(tensor.mapped, np.float32, f"{folder}: {key}", allow_nonfinite=False)
        for key, tensor in there.items()
    }
    try:
        weight, bias = tensors.pop("linear.weight"), tensors.pop("linear.bias") if said.get("bias", True) else None
        residual = None
        if said.get("use_residual"):
            same = weight.shape[0] == weight.shape[1]
            residual = np.eye(len(weight), dtype=np.float32) if same else tensors.pop("residual.weight")
    except KeyError as error:
        raise ValueError(f"{folder}: the weights have no {error.args[0]}") from error
    if tensors:
        raise ValueError(f"{folder}: the weights have {', '.join(tensors)}, which its config.json has no use for")
    return Dense(weight, bias, name, residual)


def _read(path: Path, default: Any) -> Any:
    """A JSON file of the default's type; the default where there is no file."""
    if not path.is_file():
        return default
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, type(default)):
        raise ValueError(f"{path} holds {type(content).__name__}, expected {type(default).__name__}")
    return content
