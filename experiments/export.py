"""A model as programs that plain JAX loads and runs: on a CPU, a GPU or a TPU, without this library.

    python -m experiments.export runs/causal_lm/tiny out
    python -m experiments.export state-spaces/mamba-130m out --dtype bfloat16 --max-len 4096
    python -m experiments.export FOLDER out --platforms cpu,tpu

Writes a folder: one file a program (forward, and of a language model prompt and decode; of an encoder forward and
hidden or embed; of images forward and features), the weights beside them, once for all, in weights.safetensors, the
tokenizer, program.json, which says what each program takes and gives, and README.md, with the lines that load it.

A program takes any number of rows and, of text, of tokens up to --max-len; images are those of the model's own size.
Each platform finds its own algorithm in it. It runs with this and later releases of JAX, for half a year at least
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). What is written is read back, run here and
compared with the model before the command says so.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import zoo
from experiments.loop import flags
from experiments.model_folders import load_model, write_companions
from zoo.models.build import Model
from zoo.models.programs import Program, programs, weights

WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# RMS of the difference of a program from the model, over that of what the model gives, at most: rounding alone.
CLOSE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a model as programs for plain JAX."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    platforms: str = "cpu,cuda,tpu"
    """What the programs run on, of cpu, cuda, rocm and tpu; one program holds all of them."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of weights and computation. None: that of the source."""
    max_len: int | None = None
    """The most tokens in a row, prompt and what follows it: attention and M2 keep room for as many. None: the most that
    the model can read, or 2,048."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    matmul_precision: Literal["high", "highest"] | None = None
    """How exactly layers multiply float32 on a TPU or GPU, as `jax.default_matmul_precision` takes it. None: as they do
    by themselves."""


def main() -> int:
    """Loads, exports, writes, reads back and compares."""
    config = flags.parse_one(Config, prog="python -m experiments.export", description=__doc__)
    with flags.usage_errors():
        if config.target.exists() and any(config.target.iterdir()):
            raise ValueError(f"{config.target} is not empty; choose another folder")
        if config.max_len is not None and config.max_len < 1:
            raise ValueError(f"--max-len {config.max_len}, expected at least 1")
        platforms = _platforms(config.platforms)
        model, folder, _ = load_model(config.source, dtype=config.dtype, checkpoint=config.checkpoint)
        found = programs(model, max_len=config.max_len)
        config.target.mkdir(parents=True, exist_ok=True)
        for name, program in found.items():
            with jax.default_matmul_precision(config.matmul_precision):
                exported = jax.export.export(jax.jit(program.function), platforms=platforms)(*program.arguments)
            (config.target / f"{name}.bin").write_bytes(exported.serialize())
        arrays = weights(model)
        save_file({name: np.asarray(x) for name, x in arrays.items()}, config.target / WEIGHTS)
        write_companions(folder, config.target, model, source=config.source, layout="native")
        described = _described(model, found, config)
        (config.target / "program.json").write_text(json.dumps(described, indent=2) + "\n")
        (config.target / "README.md").write_text(_readme(model, described, config))
        compared = _compared(model, found, arrays, config)
    files = ", ".join(f"{name}.bin" for name in found)
    print(f"{config.source} -> {config.target}: {files} for {', '.join(platforms)}; README.md says how to load them")
    print(compared)
    return 0


def _platforms(given: str) -> list[str]:
    """The platforms of "cpu,tpu".

    Raises:
      ValueError: another one, or none.
    """
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(f"--platforms {given}, expected some of {', '.join(PLATFORMS)}, with commas between them")
    return list(dict.fromkeys(names))


def _described(model: Model, found: dict[str, Program], config: Config) -> dict[str, Any]:
    """What program.json says."""

    def shape(x):
        return [n if isinstance(n, int) else str(n) for n in x.shape]

    def one(program: Program) -> dict[str, Any]:
        rest = zip(program.names[1:], program.arguments[1:], strict=True)
        arguments = {
            name: [{"shape": shape(x), "dtype": str(x.dtype)} for x in jax.tree.leaves(argument)]
            for name, argument in rest
        }
        return {"arguments": {"weights": WEIGHTS, **arguments}, "gives": program.gives}

    described: dict[str, Any] = {
        "model": type(model).__name__,
        "pattern": model.config.pattern,
        "dtype": str(jnp.dtype(model.config.dtype)),
        "platforms": _platforms(config.platforms),
        "jax": jax.__version__,
        "programs": {name: one(program) for name, program in found.items()},
    }
    if isinstance(model, zoo.CausalLM | zoo.MaskedLM):
        described["vocab_size"] = model.config.vocab_size
    most = next(iter(found.values())).most
    return described if most is None else described | {"max_len": most}


_LOAD = """from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
from safetensors.flax import load_file

folder = Path("{folder}")
weights = load_file(folder / "weights.safetensors")


def load(name):
    return jax.jit(jax.export.deserialize((folder / name).read_bytes()).call)

"""
_CAUSAL = """
prompt, decode = load("prompt.bin"), load("decode.bin")
ids = jnp.array([[1, 2, 3]], jnp.int32)  # prompts of unequal length stand flush right, False in the mask on their left
logits, state = prompt(weights, ids, jnp.ones(ids.shape, bool))
for _ in range(20):
    token = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
    ids = jnp.concatenate([ids, token], axis=1)
    logits, state = decode(weights, token, state)
print(ids)
"""
_TEXT = """
{name} = load("{name}.bin")
ids = jnp.array([[1, 2, 3]], jnp.int32)
print({name}(weights, ids, jnp.ones(ids.shape, bool){more}))
"""
_IMAGES = """
{name} = load("{name}.bin")
images = jnp.zeros((1, {size}, {size}, {channels}))  # normalised as the model was trained
print({name}(weights, images))
"""


def _readme(model: Model, described: dict[str, Any], config: Config) -> str:
    """How to call what lies here."""
    name = "forward" if "forward" in described["programs"] else next(iter(described["programs"]))
    if isinstance(model, zoo.CausalLM):
        call = _CAUSAL
    elif isinstance(model, zoo.ImageClassifier):
        call = _IMAGES.format(name=name, size=model.config.image_size, channels=model.config.channels)
    else:
        more = ", jnp.zeros_like(ids)" if "token_type_ids" in described["programs"][name]["arguments"] else ""
        call = _TEXT.format(name=name, more=more)
    platforms = ", ".join(_platforms(config.platforms))
    lines = [f"- `{one}.bin`: {program['gives']}" for one, program in described["programs"].items()]
    return (
        f"# {described['model']}, `{described['pattern']}`\n\nPrograms of JAX {jax.__version__} for {platforms}, and "
        f"their weights. They need `jax`, `flatbuffers` and `safetensors`, of these releases or later ones:\n\n"
        f"```python\n{_LOAD.format(folder=config.target)}{call}```\n\n" + "\n".join(lines) + "\n\n"
        "`program.json` says what each takes: b is any number of rows, l any number of tokens up to `max_len`.\n"
    )


def _compared(model: Model, found: dict[str, Program], arrays: dict[str, Any], config: Config) -> str:
    """Runs what was written where this process can, and says how far it is from the model.

    Raises:
      ValueError: further than rounding.
    """
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in _platforms(config.platforms):
        return f"not run here, on a {platform}"
    worst, state, dtype = 0.0, None, str(jnp.dtype(model.config.dtype))
    for name, program in found.items():
        given = _example(program, model, state)
        again = jax.export.deserialize(bytearray((config.target / f"{name}.bin").read_bytes()))
        with jax.default_matmul_precision(config.matmul_precision):
            expected = jax.jit(program.function)(arrays, *given)
        if name == "prompt":
            state = expected[1]
        worst = max(worst, _distance(again.call(arrays, *given), expected))
        if not worst <= CLOSE[dtype]:
            raise ValueError(f"{name}.bin gives other numbers than the model: {worst:.1e} of them, in {dtype}")
    return f"read back, run here, and equal to the model within {worst:.0e}"


def _example(program: Program, model: Model, state: Any) -> list[Any]:
    """What a program is called with after the weights, for two rows of a few tokens; a state is that of a prompt."""
    rng, length = np.random.default_rng(0), min(5, program.most or 5)

    def fill(name, x):
        if name == "state":
            return state
        shape = [n if isinstance(n, int) else {"b": 2, "l": length}[str(n)] for n in x.shape]
        if name == "mask":
            return jnp.ones(shape, x.dtype)
        if name == "images":
            return jnp.asarray(rng.standard_normal(shape), x.dtype)
        return jnp.asarray(
            rng.integers(0, getattr(model.config, "vocab_size", 1) if name == "ids" else 1, shape), x.dtype
        )

    return [fill(*pair) for pair in zip(program.names[1:], program.arguments[1:], strict=True)]


def _distance(actual: Any, expected: Any) -> float:
    """The largest RMS error over the RMS of what is expected, of the floats."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = float(np.sqrt(np.mean(e**2))) if e.size else 0.0
        error = float(np.sqrt(np.mean((a - e) ** 2))) if e.size else 0.0
        worst = max(worst, error / scale if scale else error)
    return worst


if __name__ == "__main__":
    flags.run(main)
