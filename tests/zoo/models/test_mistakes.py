"""What a user of the library gets wrong is answered by a line that says what was expected."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = {"d_model": 8, "n_layers": 1, "pattern": "mamba", "vocab_size": 30}
CAUSAL = zoo.CausalLM(zoo.CausalLMConfig(**SMALL), rngs=0)  # 32 rows
MASKED = zoo.MaskedLM(zoo.MaskedLMConfig(**SMALL, max_len=8), rngs=0)


def test_dtypes_may_be_objects():
    model = zoo.create("mamba-130m", rngs=nnx.Rngs(0), **SMALL, dtype=jnp.bfloat16, param_dtype=np.dtype("bfloat16"))
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    assert zoo.BackboneConfig(dtype=np.float32) == zoo.BackboneConfig()
    for wrong in (jnp.int32, None, "bf16", 3):
        with pytest.raises(ValueError, match=r"dtype=.*, expected one of bfloat16, float16"):
            zoo.BackboneConfig(dtype=wrong)


@pytest.mark.parametrize("seed", [7, np.int64(7), jax.random.key(7)])
def test_a_seed_may_stand_for_streams_of_keys(seed):
    one, other = (zoo.CausalLM(CAUSAL.config, rngs=rngs) for rngs in (nnx.Rngs(7), seed))
    np.testing.assert_array_equal(one.embedding.embedding[...], other.embedding.embedding[...])


def test_what_gives_no_keys_is_refused():
    for build in (
        lambda rngs: zoo.create("mamba-130m", rngs=rngs, **SMALL),
        lambda rngs: zoo.MaskedLM(MASKED.config, rngs=rngs),
        lambda rngs: zoo.Backbone(zoo.BackboneConfig(), rngs=rngs),
        lambda rngs: zoo.ImageClassifier(zoo.ImageClassifierConfig(), rngs=rngs),
        lambda rngs: zoo.with_head(MASKED, zoo.TokenClassifierConfig, rngs=rngs),
    ):
        with pytest.raises(ValueError, match=r"rngs='0', expected nnx\.Rngs\(0\), or a seed"):
            build("0")
    with pytest.raises(ValueError, match=r"rngs=0, expected None or nnx\.Rngs\(dropout=key\)"):
        CAUSAL(jnp.array([[1]]), rngs=0)


WRONG_IDS = [
    (jnp.array([1, 2, 3]), r"ids has shape \(3,\), expected \(b, l\): .* one row of 3 is ids\[None\]"),
    (jnp.array([[1.0]]), "ids holds float32, expected integers"),
    ("hello", "ids is 'hello', expected an array of token ids"),
    ([[1, 2]], r"ids is \[\[1, 2\]\], expected an array of token ids"),
    (jnp.array([[1, -1]]), "ids holds -1 to 1, expected 0 to 31, the vocabulary"),
    (np.array([[1, 32]]), "ids holds 1 to 32, expected 0 to 31"),
    (np.array([[2**32 + 1]]), "ids holds 4294967297 to 4294967297, expected 0 to 31"),
]


@pytest.mark.parametrize(("ids", "message"), WRONG_IDS)
def test_ids_outside_of_the_vocabulary_are_refused(ids, message):
    for call in (CAUSAL, CAUSAL.hidden, MASKED, MASKED.hidden, lambda ids: CAUSAL.extend(ids, CAUSAL.init_state(1))):
        with pytest.raises(ValueError, match=message):
            call(ids)


def test_rows_that_pad_the_vocabulary_are_no_mistake():
    assert CAUSAL(jnp.array([[0, 31]])).shape == (1, 2, 32)


def test_kinds_of_tokens_that_there_are_none_of_are_refused():
    with pytest.raises(ValueError, match="token_type_ids holds 2 to 2, expected 0 to 1"):
        MASKED(jnp.array([[1]]), token_type_ids=jnp.array([[2]]))


def test_ids_are_not_looked_at_while_a_function_is_traced():
    @jax.jit
    def logits(ids):
        return CAUSAL(ids)

    graphdef, params = nnx.split(CAUSAL)
    with jax.transfer_guard("disallow_explicit"):
        traced = jax.eval_shape(logits, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    assert traced.shape == (1, 2, 32)
    closed_over = np.array([[-1]])
    assert jax.eval_shape(lambda params: nnx.merge(graphdef, params)(closed_over), params).shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hello", "prompt_ids holds the text 'hello', expected token ids"),
        (["hello", "you"], "prompt_ids holds the text .*hello.*, expected token ids"),
        ([[2**32 + 1]], "prompt_ids holds 4294967297 to 4294967297, expected 0 to 29"),
        ([1.9], r"prompt_ids holds the values '1\.9|\[1\.9\]', expected token ids"),
        (np.array([[1.0]]), r"prompt_ids holds the values '\[1\.\]', expected token ids"),
        ([[1, -1]], "prompt_ids holds -1 to 1, expected 0 to 29"),
        ([[True]], "prompt_ids holds the values"),
    ],
)
def test_prompts_that_are_no_token_ids_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        zoo.generate(CAUSAL, prompt, 1)


@pytest.mark.parametrize(("name", "value"), [("eos_id", 2**32 + 1), ("eos_id", [1.9]), ("pad_id", 1.9), ("pad_id", -1)])
def test_special_tokens_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} holds"):
        zoo.generate(CAUSAL, [[1]], 1, **{name: value})


def test_only_a_causal_model_generates():
    with pytest.raises(ValueError, match="model is a MaskedLM, expected a CausalLM"):
        zoo.generate(MASKED, [[1]])


def test_images_that_are_none_are_refused():
    model = zoo.ImageClassifier(zoo.ImageClassifierConfig(d_model=8, n_layers=1, image_size=8, patch_size=4), rngs=0)
    for wrong in (jnp.zeros((8, 8, 3)), jnp.zeros((1, 8, 8, 3), jnp.uint8)):
        with pytest.raises(ValueError, match=r"images are \w+\(.*\), expected floats \(b, x, y, c\)"):
            model(wrong)


def test_a_preset_s_name_is_no_folder():
    with pytest.raises(FileNotFoundError, match=r"the preset of that name is zoo\.create\('mamba-130m', rngs=0\)"):
        zoo.from_pretrained("mamba-130m")


BERTS = [{"model_type": "distilbert", "dim": 8, "n_layers": 1, "n_heads": 1}, {"model_type": "roberta"}]


@pytest.mark.parametrize("raw", BERTS)
def test_an_unknown_type_is_told_all_that_are_known(tmp_path, raw):
    pytest.importorskip("safetensors")
    zoo.save_pretrained(CAUSAL, tmp_path, "transformers")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"unknown model_type '{raw['model_type']}'") as error:
        zoo.from_pretrained(tmp_path)
    for known in ("bert", "modernbert", "vit", "deit", "vim", "m2_bert", "llama", "mamba2", "falcon_h1", "zamba2"):
        assert f" {known}," in str(error.value) or str(error.value).endswith(f" {known}")


FIELDS = ["layer_norm_epsilon", "hidden_size", "state_size", "time_step_min"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["x", True])
def test_a_field_that_is_no_number_is_named_as_in_its_file(tmp_path, field, value):
    pytest.importorskip("safetensors")
    zoo.save_pretrained(CAUSAL, tmp_path, "transformers")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {field: value}))
    with pytest.raises(
        ValueError, match=rf"config\.json: {field}={re.escape(repr(value))}, expected a (whole )?number"
    ):
        zoo.from_pretrained(tmp_path)
