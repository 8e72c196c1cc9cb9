"""Chat templates give the text that transformers gives, and harm nobody."""

import json
from pathlib import Path

import pytest

from experiments.data import chat_template
from experiments.data.chat_template import ChatTemplate, chat_templates, find_chat_template, render_chats

# Templates in the styles of published models, and what `apply_chat_template` of transformers 5.24.0 makes of messages.
WRITTEN = json.loads(Path(__file__).with_name("chat_templates.json").read_text())
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("case", WRITTEN["templates"], ids=lambda case: case["name"])
def test_a_template_gives_the_text_that_transformers_gives(case):
    template = ChatTemplate(case["template"], "TEMPLATE")
    texts = {name: one["text"] for name, one in case["rendered"].items() if "text" in one}
    rendered = render_chats(template, [WRITTEN["conversations"][name] for name in texts], special=SPECIAL)
    assert dict(zip(texts, rendered, strict=True)) == texts


def test_what_a_template_refuses_is_one_line_that_says_so():
    (gemma,) = (case for case in WRITTEN["templates"] if case["name"] == "gemma")
    said = {name: one["error"] for name, one in gemma["rendered"].items() if "error" in one}
    assert said.keys() == {"system", "twice"}
    chats = [WRITTEN["conversations"][name] for name in ("one", "system")]
    with pytest.raises(ValueError, match=f"T: conversation 2: it refuses the messages: {said['system']}"):
        render_chats(ChatTemplate(gemma["template"], "T"), chats, special=SPECIAL)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "it takes longer than 1 s"),
        ("{{ 'a' * 10 ** 10 }}", "it takes more than 1,024 MiB of memory"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "it writes more than 10,000,000 characters"),
        ("{{ ''.__class__.__mro__ }}", "it fails: SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "it fails: SecurityError"),
        ("{{ nothing.there }}", "it fails: UndefinedError: 'nothing' is undefined"),
        ("a\n{% if", "line 2 is no template"),
        ("{{" + "(" * 5000, "it is no template: RecursionError"),
        ("{{ raise_exception('a\nb') }}", "it refuses the messages: a b"),
    ],
)
def test_a_hostile_template_is_one_line_in_bounded_time_and_memory(template, message):
    with pytest.raises(ValueError, match=f"^T: {message}") as raised:
        render_chats(ChatTemplate(template, "T"), [[{"role": "user", "content": "a"}]], special={}, seconds=1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
        ({"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "a"}}, {"default": "a"}),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in ("default", "rag")]}},
            {"default": "default", "rag": "rag"},
        ),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b\r\nc"}, {"default": "b\nc"}),
        (
            {"chat_template.jinja": "b", "additional_chat_templates/rag.jinja": "c"},
            {"default": "b", "rag": "c"},
        ),
    ],
)
def test_a_template_is_read_from_where_folders_have_it(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    found = chat_templates(tmp_path)
    assert {name: one.text for name, one in found.items()} == expected
    assert find_chat_template(tmp_path) == found.get("default")
    (tmp_path / "other").mkdir()
    chat_template.save_chat_templates(found, tmp_path / "other")
    assert {name: one.text for name, one in chat_templates(tmp_path / "other").items()} == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "a" * (2**20 + 1), "chat_template.jinja has more than 1,048,576 bytes"),
        ("tokenizer_config.json", {"chat_template": "a" * (2**20 + 1)}, "has 1,048,577 characters"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template of .*tokenizer_config.json is 5, expected"),
        ("tokenizer_config.json", {"chat_template": [{"name": "../x", "template": ""}]}, "named '../x', expected"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": ""}]},
            "named rag, expected one named",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("chat_template.jinja", None, "chat_template.jinja leads out of the folder"),
    ],
)
def test_a_file_that_holds_no_template_is_named(tmp_path, name, content, message):
    if content is None:
        (tmp_path / name).symlink_to("/etc/hostname")
    else:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        find_chat_template(tmp_path)
