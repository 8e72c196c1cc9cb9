"""Programs that plain JAX loads and runs: written by the command, run where this library cannot be imported."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from experiments import export
from tests.numerics import assert_close

# What a process runs first: from here on, nothing of this repository can be imported.
ALONE = """
import sys
for name in ("m2", "ssm", "zoo", "experiments", "flax"):
    sys.modules[name] = None
"""


def snippet(folder):
    """The Python of the folder's README."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[1]


def run_alone(program, cwd):
    """What a process that does not have this library prints."""
    done = subprocess.run([sys.executable, "-c", ALONE + program], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_jax_goes_on_with_a_text_as_generate_does(run_command, empty_folder, unchecked):
    config = zoo.CausalLMConfig(
        d_model=16,
        n_layers=2,
        vocab_size=30,
        pattern="mamba2 attn/mlp",
        attn=zoo.AttentionConfig(head_dim=8),
        mamba2=ssm.Mamba2Config(head_dim=8, d_state=4),
    )
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, "model")
    status, out, err = run_command(export, "model", "out", "--platforms", "cpu,cuda,tpu", "--max-len", "64")
    assert status == 0, err
    assert "forward.bin, prompt.bin, decode.bin for cpu, cuda, tpu" in out
    assert "read back, run here, and equal to the model within" in out
    expected = zoo.generate(model, [[1, 2, 3]], max_new_tokens=20)
    printed = run_alone(snippet(empty_folder / "out"), empty_folder)
    assert [int(n) for n in re.findall(r"\d+", printed)] == expected[0].tolist()
    described = json.loads((empty_folder / "out" / "program.json").read_text())
    assert (described["max_len"], described["vocab_size"], described["platforms"]) == (64, 30, ["cpu", "cuda", "tpu"])

    # Each platform its own algorithm, out of the file: the scan is a loop over positions on a CPU alone.
    program = jax.export.deserialize((empty_folder / "out" / "forward.bin").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "stablehlo.case" in program.mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (zoo.MaskedLM, {"vocab_size": 30, "pattern": "m2/monarch", "max_len": 32}, "forward"),
        (zoo.SequenceClassifier, {"vocab_size": 30, "pattern": "attn/mlp", "max_len": 32, "n_labels": 0}, "embed"),
        (zoo.ImageClassifier, {"image_size": 16, "patch_size": 4, "n_classes": 3, "pattern": "vim"}, "forward"),
    ],
)
def test_encoders_and_image_classifiers_go_out_as_well(kind, options, name, run_command, empty_folder, unchecked):
    config = {c.__name__.removesuffix("Config"): c for c in (zoo.MaskedLMConfig, zoo.SequenceClassifierConfig)}.get(
        kind.__name__, zoo.ImageClassifierConfig
    )(d_model=16, n_layers=1, attn=zoo.AttentionConfig(head_dim=8), m2=m2.M2Config(l_max=32), **options)
    model = kind(config, rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, "model")
    status, _, err = run_command(export, "model", "out", "--dtype", "float32", "--platforms", "cpu,tpu")
    assert status == 0, err
    program = snippet(empty_folder / "out").replace("print(", "import numpy; numpy.save('result.npy', ")
    run_alone(program, empty_folder)
    if kind is zoo.ImageClassifier:
        expected = model(jnp.zeros((1, 16, 16, 3)))
    else:
        expected = getattr(model, {"forward": "__call__"}.get(name, name))(
            jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)
        )
    assert_close(np.load("result.npy"), np.asarray(expected)[..., :30] if name == "forward" else np.asarray(expected))


def test_what_cannot_be_written_is_said_in_one_line(run_command, empty_folder, unchecked):
    config = zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=30, pattern="m2", m2=m2.M2Config(l_max=16))
    zoo.save_pretrained(zoo.CausalLM(config, rngs=nnx.Rngs(0)), "model")
    for arguments, words in (
        (("--max-len", "17"), "max_len=17, expected at most 16, the longest row that the model reads"),
        (("--max-len", "0"), "--max-len 0, expected at least 1"),
        (("--platforms", "cpu,gpu"), "--platforms cpu,gpu, expected some of cpu, cuda, rocm, tpu"),
    ):
        status, _, err = run_command(export, "model", "out", *arguments)
        assert (status != 0, err.count("\n")) == (True, 1)
        assert words in err
    (empty_folder / "out").mkdir()
    (empty_folder / "out" / "there").touch()
    status, _, err = run_command(export, "model", "out")
    assert (status, "out is not empty" in err) == (1, True)
