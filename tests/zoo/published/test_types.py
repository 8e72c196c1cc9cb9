"""What type checkers know of models that come by name or from a file: the kind, where the call says it."""

import re

import pytest

from tests.places import ROOT

ANY = "CausalLM | MaskedLM | SequenceClassifier | TokenClassifier | ImageClassifier | VisionLanguageModel"
# Each line with what mypy says of it: the type that it reveals, an error's code, or nothing.
LINES = (
    ('zoo.generate(zoo.create("mamba-130m", rngs=RNGS), [[1]], max_new_tokens=2)', None),
    ('zoo.generate(zoo.from_pretrained("x", kind=zoo.CausalLM), [[1]], max_new_tokens=2)', None),
    ('zoo.create("m2-bert-80m", rngs=RNGS, n_layers=1).hidden(IDS, token_type_ids=IDS, rngs=RNGS)', None),
    ('zoo.create("m2-bert-80m-2k-retrieval", rngs=RNGS).embed(IDS, IDS > 0)', None),
    ('zoo.create("vit-base", rngs=RNGS).features(IDS)', None),
    ("zoo.create(NAME, rngs=RNGS, kind=zoo.TokenClassifier)(IDS, None, IDS)", None),
    ('reveal_type(zoo.create("mamba-130m", rngs=RNGS))', "CausalLM"),
    ('reveal_type(zoo.create("bert-base", rngs=RNGS))', "MaskedLM"),
    ('reveal_type(zoo.create("m2-bert-80m-8k-retrieval", rngs=RNGS))', "SequenceClassifier"),
    ('reveal_type(zoo.create("vit-base", rngs=RNGS))', "ImageClassifier"),
    ('reveal_type(zoo.create("llava-1.5-7b", rngs=RNGS))', "VisionLanguageModel"),
    ("reveal_type(zoo.create(NAME, rngs=RNGS, kind=zoo.MaskedLM))", "MaskedLM"),
    ("reveal_type(zoo.create(NAME, rngs=RNGS))", ANY),
    ('reveal_type(zoo.from_pretrained("x", kind=zoo.CausalLM, dtype="bfloat16"))', "CausalLM"),
    ('reveal_type(zoo.from_pretrained("x"))', ANY),
    ('zoo.generate(zoo.create("bert-base", rngs=RNGS), [[1]])', "[arg-type]"),
    ("zoo.generate(zoo.create(NAME, rngs=RNGS), [[1]])", "[arg-type]"),
    ('zoo.generate(zoo.from_pretrained("x", kind=zoo.MaskedLM), [[1]])', "[arg-type]"),
    ('zoo.create("vit-base", rngs=RNGS).embed(IDS)', "[attr-defined]"),
    ('zoo.create("bert-base", rngs=RNGS).hidden(IDS, tokens=IDS)', "[call-arg]"),
    ('zoo.from_pretrained("x", kind=zoo.Encoder)', "[type-var]"),
)


@pytest.mark.slow
def test_the_kind_of_a_model_is_known_where_its_call_says_it(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    head = ["import jax.numpy as jnp", "from flax import nnx", "import zoo"]
    head += ["RNGS, IDS = nnx.Rngs(0), jnp.ones((1, 2), int)", "NAME: str = input()"]
    program = tmp_path / "idioms.py"
    program.write_text("\n".join([*head, *(line for line, _ in LINES)]) + "\n")
    said, problems, _ = api.run(["--no-error-summary", str(program)])  # options and cache are those of `make check`
    assert not problems
    messages: dict[int, str] = {}
    for number, message in re.findall(r"idioms\.py:(\d+): (.*)", said):
        messages[int(number)] = messages.get(int(number), "") + re.sub(r"\b[a-z_.]+\.(?=[A-Z])", "", message)
    for number, (line, expected) in enumerate(LINES, start=len(head) + 1):
        message = messages.pop(number, "")
        if expected is None:
            assert not message, line
        elif expected.startswith("["):
            assert message.startswith("error: "), (line, message)
            assert expected in message, (line, message)
        else:
            assert message == f'note: Revealed type is "{expected}"', line
    assert not messages
