"""Renders a chat template, in a process of its own: templates are programs of strangers.

A job comes in and its outcome goes out as JSON, see `main`. This file imports jinja2 and Python's own alone, so that it
starts at once; it runs as a script, and its process may use so much memory, so much time, write so much, and no more.
"""

import contextlib
import datetime
import json
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 2**30
"""Bytes of address space that rendering may take."""


class Refused(Exception):
    """Why there is no text: the template says so of these messages, or writes too much."""


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what a model has said, for training; the text is the same."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def environment() -> jinja2.Environment:
    """What chat templates are written for: that of transformers (`apply_chat_template`), from its documentation."""

    def refuse(message: str) -> None:
        raise Refused(f"it refuses the messages: {message}")

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def render(template: str, conversations: list, variables: dict, max_characters: int) -> list[str]:
    """The text of each conversation, up to where a model's answer begins.

    Raises:
      ValueError: says why there is none.
    """
    try:
        compiled = environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} is no template: {error.message}") from error
    except Exception as error:  # nested deeper than Python or jinja2 follow
        raise ValueError(f"it is no template: {type(error).__name__}: {error}") from error
    texts = []
    for number, messages in enumerate(conversations, start=1):
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        where = f"conversation {number}: " if len(conversations) > 1 else ""
        parts, left = [], max_characters
        try:
            for part in compiled.generate(**variables, **given, messages=messages):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise Refused(f"it writes more than {max_characters:,} characters")
        except Refused as error:
            raise ValueError(f"{where}{error}") from error
        except MemoryError as error:
            raise ValueError(f"{where}it takes more than {MEMORY >> 20:,} MiB of memory") from error
        except Exception as error:  # whatever a program of strangers comes to
            raise ValueError(f"{where}it fails: {type(error).__name__}: {error}") from error
        texts.append("".join(parts))
    return texts


def limit(seconds: int) -> None:
    """Bounds the memory and the processor's time of this process, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> None:
    """{"template", "conversations", "variables", "max_characters", "seconds"} in, {"texts"} or {"error"} out."""
    job = json.load(sys.stdin)
    limit(job.pop("seconds"))
    try:
        said: dict[str, Any] = {"texts": render(**job)}
    except ValueError as error:
        said = {"error": str(error)}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
