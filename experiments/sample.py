"""Text from a run's checkpoint, or from a published model, as it is generated.

    python -m experiments.sample runs/causal_lm/tiny --prompt "def "
    python -m experiments.sample runs/causal_lm/tiny --prompt "class " --temperature 0 --max-new-tokens 500
    python -m experiments.sample --model state-spaces/mamba-130m --prompt "Mamba is"
    python -m experiments.sample --model ./my-mamba2 --dtype bfloat16 --prompt "Mamba is"
    python -m experiments.sample RUN --prompt "def " --prompt "class " --stop $'\\n\\n'   # each up to a blank line
    python -m experiments.sample RUN --prompts-file prompts.txt --out out.jsonl          # a prompt a line; JSON lines
    echo "def f" | python -m experiments.sample RUN --prompt - --jsonl
    python -m experiments.sample --model FOLDER --chat --system "Be brief." --prompt "Why is the sky blue?"

With --chat a prompt is what a user says, put into the words that the model was trained to answer: by the chat template
of its folder, or of the one that its run was begun from. What is printed is the answer. Special tokens that a message
spells are read as such, as in transformers.
"""

import dataclasses
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import jax

import zoo
from experiments.causal.continuations import continue_prompts, until_stop
from experiments.causal.load import load_published
from experiments.causal.text_ends import TextEnds, chat_ends, published_ends, run_ends
from experiments.causal_lm import load_run
from experiments.data.chat_template import (
    ChatTemplate,
    Message,
    check_messages,
    find_chat_template,
    render_chats,
)
from experiments.data.text_stream import TextStream, stream_text
from experiments.data.tokenizers import Tokenizer
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, on_mesh
from experiments.loop.row_files import STANDARD, check_out, write_rows
from zoo.published.json_files import parse_json
from zoo.published.pretrained import find_folder
from zoo.published.run_folder import is_run


@dataclasses.dataclass(frozen=True)
class Config:
    """Continues a text with a trained model."""

    run_dir: Annotated[Path | None, flags.Positional] = None
    """Folder of the run, or of a saved or published model. Not with --model."""
    model: str | None = None
    """A published model instead of a run: a folder in a published layout, or a name on the Hugging Face hub."""
    tokenizer: str | None = None
    """With --model: "bytes", a tokenizer.json or its folder, or a name on the hub. None: that of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """With --model: dtype of parameters and computation. None: as stored."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    prompt: Annotated[tuple[str, ...], flags.Repeated] = ()
    """Text to continue; several by the flag again. Empty starts a new document. -: all of standard input."""
    prompts_file: str | None = None
    """Prompts: .jsonl has strings, or objects with "prompt", or with --chat with "messages", a conversation each; any
    other a prompt a line. -: lines of standard input."""
    chat: bool = False
    """Put prompts into the words of a chat, by the model's chat template."""
    system: str | None = None
    """With --chat: what stands before each conversation as the system's message."""
    stop: Annotated[tuple[str, ...], flags.Repeated] = ()
    """A string that ends a text, and is not part of it; several by the flag again."""
    jsonl: bool = False
    """Print a line of JSON for each text, with its prompt, when it is done."""
    out: str | None = None
    """Write these lines to a .jsonl (or a .csv) instead."""
    overwrite: bool = False
    """Whether OUT may exist already."""
    batch_size: int = 16
    """Prompts that go on at the same time."""
    max_new_tokens: int = 300
    """Tokens to add; less when the model ends the document."""
    samples: int = 1
    """How many continuations."""
    temperature: float = 0.8
    """Below 1 sharpens, above 1 flattens; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the most likely tokens until their probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that were there before."""
    seed: int | None = None
    """Seed of the draws. None: a new one each time; it is printed."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint: latest, best, or a step."""
    allow_nonfinite: bool = False
    """Take weights that are infinite or no numbers as they are, rather than refuse them."""

    def __post_init__(self):
        for name in ("prompt", "stop"):  # one string is one of them, not its letters
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, (value,))


class Opened(NamedTuple):
    """A model, and what is known of its texts."""

    model: zoo.CausalLM
    tokenizer: Tokenizer
    ends: TextEnds
    template: ChatTemplate | None
    """Of --chat."""


class Prompt(NamedTuple):
    """What a text goes on from."""

    record: dict[str, Any]
    """As it was given: {"prompt": "def "}, or {"messages": [...]}."""
    shown: str
    """What is printed before what follows it."""
    ids: list[int]
    """Tokens, with what opens a text."""


def main() -> int:
    """Loads the model and prints or writes continuations."""
    config = flags.parse_one(Config, prog="python -m experiments.sample", description=__doc__)
    with flags.usage_errors(), on_mesh(config.mesh):
        if config.out is not None:
            check_out(config.out, overwrite=config.overwrite)
        if min(config.batch_size, config.samples) < 1 or "" in config.stop:
            raise ValueError(
                f"--batch-size {config.batch_size} --samples {config.samples} --stop {config.stop}, expected 1 or "
                "more, and no empty ones"
            )
        sampling = zoo.Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
        asked = read_prompts(config)
        opened = open_model(config)
        prompts = make_prompts(asked, opened)
        seed = secrets.randbelow(2**31) if config.seed is None else config.seed
        rows = _continued(config, opened, prompts, sampling, seed)
        if config.out is not None:
            write_rows(rows, config.out)
        elif config.jsonl:
            write_rows(rows, STANDARD)
        else:
            _print(config, opened, prompts, sampling, seed)
    print(f"seed {seed}", file=sys.stderr)
    return 0


def _continued(
    config: Config, opened: Opened, prompts: Sequence[Prompt], sampling: zoo.Sampling, seed: int
) -> Iterator[dict[str, Any]]:
    """A record of each continuation: prompts in batches, those of one sample together."""
    for sample in range(config.samples):
        key = jax.random.fold_in(jax.random.key(seed), sample)
        for first in range(0, len(prompts), config.batch_size):
            part = prompts[first : first + config.batch_size]
            options: dict[str, Any] = {"sampling": sampling, "key": key, "stop": config.stop, "first_row": first}
            options |= {"ends": opened.ends.closing, "apart": config.chat}
            ids = [prompt.ids for prompt in part]
            said = continue_prompts(opened.model, opened.tokenizer, ids, config.max_new_tokens, **options)
            for number, (prompt, one) in enumerate(zip(part, said, strict=True), start=first):
                about = prompt.record if len(prompts) == 1 else {"number": number} | prompt.record
                yield about | {"sample": sample, **one._asdict(), "seed": seed}


def _print(config: Config, opened: Opened, prompts: Sequence[Prompt], sampling: zoo.Sampling, seed: int) -> None:
    """One text after another as it is generated: the same that `_continued` gives."""
    for number, prompt in enumerate(prompts):
        for i in range(config.samples):
            named = [f"prompt {number + 1}"] * (len(prompts) > 1) + [f"sample {i + 1}"] * (config.samples > 1)
            if named:
                print(f"--- {', '.join(named)} " + "-" * 40)
            key = jax.random.fold_in(jax.random.key(seed), i)
            tokens = zoo.generate_stream(
                opened.model,
                prompt.ids,
                config.max_new_tokens,
                sampling=sampling,
                eos_id=opened.ends.closing,
                key=jax.random.fold_in(key, number)[None],
            )
            stream = TextStream(opened.tokenizer, () if config.chat else prompt.ids, opened.ends.closing)
            said = stream_text(stream, (int(token[0]) for token in tokens))
            print(prompt.shown, end="", flush=True)
            for text in until_stop(said, config.stop):
                print(text, end="", flush=True)
            print()


def read_prompts(config: Config) -> list[str | list[Message]]:
    """The prompts that are asked for, at least one: texts, or with --chat conversations.

    Raises:
      FileNotFoundError, ValueError: one line that names the file and the line.
    """
    if config.system is not None and not config.chat:
        raise ValueError("--system belongs to --chat")
    asked = _read_prompts(config)
    if not config.chat:
        return asked
    conversations: list[Any] = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in asked]
    if config.system is None:
        return conversations
    for number, messages in enumerate(conversations, start=1):
        if messages[0]["role"] in ("system", "developer"):
            raise ValueError(f"--system, but conversation {number} begins with a {messages[0]['role']} message itself")
    return [[{"role": "system", "content": config.system}, *messages] for messages in conversations]


def _read_prompts(config: Config) -> list[Any]:
    if config.prompts_file is None:
        if config.chat and not config.prompt:
            raise ValueError("--chat, expected a --prompt, or a --prompts-file: what the user says")
        return [
            sys.stdin.read().removesuffix("\n") if prompt == STANDARD else prompt for prompt in config.prompt or [""]
        ]
    if config.prompt:
        raise ValueError("--prompt and --prompts-file exclude each other")
    name = config.prompts_file
    text = sys.stdin.read() if name == STANDARD else Path(name).read_text(encoding="utf-8-sig")
    lines: list[Any] = text.removesuffix("\n").split("\n") if text else []
    if name.endswith(".jsonl"):
        lines = [
            _prompt(line, f"{name} line {number}", config.chat)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not lines:
        raise ValueError(f"--prompts-file {name} has no prompts")
    return lines


def _prompt(line: str, where: str, chat: bool) -> str | list[Any]:
    try:
        said = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if isinstance(said, dict) and "messages" in said:
        if not chat:
            raise ValueError(f"{where} has messages; --chat puts them into the words of a chat")
        return check_messages(said["messages"], where)
    prompt = said.get("prompt") if isinstance(said, dict) else said
    if not isinstance(prompt, str):
        raise ValueError(f'{where} is {line!r:.60}, expected a string, or an object with "prompt" or "messages"')
    return prompt


def make_prompts(asked: Sequence[str | list[Message]], opened: Opened) -> list[Prompt]:
    """Prompts as tokens: texts behind what opens one, conversations as the model's template puts them.

    Raises:
      ValueError: the template does not take the messages.
    """
    if opened.template is None:
        texts = cast(Sequence[str], asked)
        return [Prompt({"prompt": text}, text, prompt_ids(text, opened.tokenizer, opened.ends)) for text in texts]
    conversations = cast(Sequence[list[Message]], asked)
    declared = opened.tokenizer.declared
    rendered = render_chats(opened.template, conversations, special={} if declared is None else declared.roles)
    return [
        Prompt({"messages": messages}, "", opened.tokenizer.encode_marked(text).tolist() or [opened.tokenizer.eot])
        for messages, text in zip(conversations, rendered, strict=True)
    ]


def load(config: Config) -> tuple[zoo.CausalLM, Tokenizer, list[int]]:
    """The model, its tokenizer, and the token ids of the first prompt."""
    asked = read_prompts(config)
    opened = open_model(config)
    return opened.model, opened.tokenizer, make_prompts(asked[:1], opened)[0].ids


def prompt_ids(prompt: str, tokenizer: Tokenizer, ends: TextEnds) -> list[int]:
    """A prompt's ids behind what opens a text; an empty one begins with what ends a text where nothing opens it."""
    return [*ends.opening, *tokenizer.encode(prompt).tolist()] or [tokenizer.eot]


def open_model(config: Config) -> Opened:
    """The model, its tokenizer, what opens and ends its texts, and with --chat its template."""
    if (config.run_dir is None) == (config.model is None):
        raise ValueError("expected either the folder of a run or --model, one of the two")
    if config.run_dir is not None and not is_run(config.run_dir) and _holds_weights(config.run_dir):
        config = dataclasses.replace(config, run_dir=None, model=str(config.run_dir))  # as the other commands take it
    if config.model is None:
        for name in ("tokenizer", "dtype"):
            if getattr(config, name) is not None:
                raise ValueError(f"--{name} belongs to --model; a run has its own")
        folder = cast(Path, config.run_dir)
        template = _template(config, folder) if is_run(folder) else None  # what it is instead, loading it says
        model, tokenizer, _ = load_run(folder, step=config.checkpoint, allow_nonfinite=config.allow_nonfinite)
        if template is None:
            return Opened(model, tokenizer, run_ends(tokenizer), None)
        return Opened(model, tokenizer, chat_ends(folder, tokenizer, model.config.vocab_size), template)
    template = _template(config, find_folder(config.model)) if config.chat else None
    model, tokenizer, folder, _ = load_published(
        config.model, tokenizer=config.tokenizer, dtype=config.dtype, allow_nonfinite=config.allow_nonfinite
    )
    return Opened(model, tokenizer, published_ends(folder, tokenizer, model.config.vocab_size), template)


def _template(config: Config, folder: Path) -> ChatTemplate | None:
    """The chat template of a model's folder, or of its --tokenizer; None without --chat."""
    if not config.chat:
        return None
    for place in (folder, *([Path(config.tokenizer)] if config.tokenizer else [])):
        if template := find_chat_template(place):
            return template
    raise ValueError(f"{folder} has no chat template, so that it has no --chat; --prompt alone goes on with a text")


def _holds_weights(folder: Path) -> bool:
    """Whether a folder is that of a model that was saved or published."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*", "*.pth"))


if __name__ == "__main__":
    flags.run(main)
