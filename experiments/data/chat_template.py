"""Chat templates: the text that a model was trained to see for messages, as its folder says it.

A template is chat_template.jinja, or else `chat_template` of tokenizer_config.json, a text or several by name, or else
that of chat_template.json. It is a program (Jinja) of whoever made the folder: `chat_render` runs it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.inside import what_is_wrong
from experiments.data.tokenizer_files import CONFIG_FILE
from experiments.loop.distributed import by_first
from zoo.published.json_files import read_json

TEMPLATE_FILE = "chat_template.jinja"
NAMED_FOLDER = "additional_chat_templates"
PROCESSOR_FILE = "chat_template.json"
# The largest published ones have some 30 kB.
MAX_BYTES = 2**20
MAX_CHARACTERS = 10**7

Message = Mapping[str, Any]
"""One turn: {"role": "user", "content": "..."}."""


class ChatTemplate(NamedTuple):
    """A template, and what errors call it."""

    text: str
    name: str


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model's folder, None where it has none; of several the one named default.

    Raises:
      ValueError: a template that is none, is too large, or leads out of the folder; several and none is the default.
    """
    templates = chat_templates(folder)
    if not templates:
        return None
    if "default" not in templates:
        raise ValueError(
            f"{folder} has chat templates named {', '.join(sorted(templates))}, expected one named default"
        )
    return templates["default"]


def chat_templates(folder: Path) -> dict[str, ChatTemplate]:
    """All templates of a model's folder by name, as `find_chat_template` reads them."""
    files = {"default": folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / NAMED_FOLDER).glob("*.jinja"))}
    found = {name: ChatTemplate(_text(path, folder), str(path)) for name, path in files.items() if path.is_file()}
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        path = folder / name
        if not found and path.is_file():
            _check(path, folder)
            found = _named(read_json(path).get("chat_template"), f"chat_template of {path}")
    return found


@by_first
def save_chat_templates(templates: Mapping[str, ChatTemplate], folder: Path) -> None:
    """Writes templates into a model's folder, each as a file of its own, in place of those there."""
    shutil.rmtree(folder / NAMED_FOLDER, ignore_errors=True)
    (folder / TEMPLATE_FILE).unlink(missing_ok=True)
    for name, template in templates.items():
        path = folder / TEMPLATE_FILE if name == "default" else folder / NAMED_FOLDER / f"{name}.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.text, encoding="utf-8")


def render_chats(
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    special: Mapping[str, str],
    seconds: int = 10,
) -> list[str]:
    """The text that opens a model's answer to each conversation; special tokens are spelled out in it.

    Equal to `apply_chat_template(messages, add_generation_prompt=True, tokenize=False)` of transformers.

    Args:
      template: the model's.
      conversations: messages, the oldest first; what is None in one counts as absent.
      special: the tokenizer's special tokens by their roles, which templates name: {"bos_token": "<s>"}.
      seconds: of the processor's time, for all of them.

    Raises:
      ValueError: the template is none, refuses the messages, or takes too long or too much: one line that says so.
    """
    plain = [[{k: v for k, v in one.items() if v is not None} for one in messages] for messages in conversations]
    job: dict[str, Any] = {"template": template.text, "conversations": plain, "variables": dict(special)}
    job |= {"max_characters": MAX_CHARACTERS, "seconds": seconds}
    # Isolated: what lies beside the file is not imported.
    command = [sys.executable, "-I", str(Path(__file__).with_name("chat_render.py"))]
    too_long = f"{template.name}: it takes longer than {seconds} s"
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, encoding="utf-8", timeout=60 + 3 * seconds
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(too_long) from error
    try:
        said = json.loads(done.stdout)
    except ValueError as error:
        if done.returncode < 0 and "MemoryError" not in done.stderr:  # a signal has ended it: its time is over
            raise ValueError(too_long) from error
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"{template.name}: it cannot be rendered: {last}") from error
    if "error" in said:
        raise ValueError(f"{template.name}: {' '.join(said['error'].split())}")
    return said["texts"]


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """A conversation as it was given, checked.

    Raises:
      ValueError: no list of objects with a role each, or an empty one: names where it stands.
    """
    expected = f'{where}: messages, expected a list of objects with "role" and "content"'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{expected}, not {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{expected}, not {message!r:.60} among them")
    return messages


def _named(said: Any, name: str) -> dict[str, ChatTemplate]:
    """Templates as JSON has them: a text, a list of {"name", "template"}, or an object of texts by name."""
    if said is None:
        return {}
    if isinstance(said, str):
        said = {"default": said}
    elif isinstance(said, list) and all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in said):
        said = {one["name"]: one["template"] for one in said}
    if not isinstance(said, dict) or not all(isinstance(one, str) for pair in said.items() for one in pair):
        raise ValueError(f"{name} is {said!r:.60}, expected a template, or several with a name each")
    for key, text in said.items():
        if len(text) > MAX_BYTES:
            raise ValueError(
                f"{name} has {len(text):,} characters, more than the {MAX_BYTES:,} that a template may have"
            )
        if not key.replace("-", "_").replace(".", "_").isidentifier():  # it becomes the name of a file
            raise ValueError(f"{name} has one named {key!r:.60}, expected letters, digits, - and _")
    return {key: ChatTemplate(text, name) for key, text in said.items()}


def _text(path: Path, folder: Path) -> str:
    _check(path, folder)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes, too many for a template")
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # as Python opens texts
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _check(path: Path, folder: Path) -> None:
    if wrong := what_is_wrong(path, folder):
        raise ValueError(f"{path} {wrong}; remove it, or put the file itself in its place")
