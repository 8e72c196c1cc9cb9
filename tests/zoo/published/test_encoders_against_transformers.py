"""BERTs and ModernBERTs that transformers writes give its numbers here, and those written here give ours there.

Runs where torch and transformers are installed; what they once gave is kept in published/ for everywhere else.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.published import bert_layout
from zoo.published.weight_files import open_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

BASE = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 29, "num_attention_heads": 4, "intermediate_size": 24}
BERT = BASE | {"max_position_embeddings": 80}
MODERN = BASE | {"num_hidden_layers": 7, "local_attention": 8, "pad_token_id": 0}
MODERN |= {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
CASES = {
    "BertForMaskedLM": BERT,
    "BertForPreTraining": BERT | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "BertForSequenceClassification": BERT | {"num_labels": 3, "hidden_act": "relu"},
    "BertForTokenClassification": BERT | {"num_labels": 5, "type_vocab_size": 3, "hidden_act": "silu"},
    "BertForQuestionAnswering": BERT,
    "BertModel": BERT,
    "ModernBertForMaskedLM": MODERN,
    "ModernBertForMaskedLM, biases": MODERN | BIASES | {"norm_eps": 1e-3, "hidden_activation": "gelu_pytorch_tanh"},
    "ModernBertForMaskedLM, all local": MODERN | {"layer_types": ["sliding_attention"] * 7, "local_attention": 4},
    "ModernBertModel": MODERN | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = (1, 2, 7, 64, 65)


def randomise(model):
    """Every parameter its own; fresh models have ones and zeros in many places, where a mistake would not show."""
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if param.ndim == 1:
            param.data.copy_(0.3 * noise + ("norm" in name.lower() and name.endswith("weight")))
        else:
            param.data.copy_(0.5 * noise if "embed" in name else noise / param.shape[1] ** 0.5)


def theirs(model, ids, mask, kinds):
    """The last hidden states, and the logits where there is a head, in the model's dtype."""
    options = {"attention_mask": torch.as_tensor(mask).long()}
    if model.config.model_type == "bert":
        options["token_type_ids"] = torch.as_tensor(kinds)
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix, model)(torch.as_tensor(ids), **options).last_hidden_state
        out = model(torch.as_tensor(ids), **options)
    if hasattr(out, "start_logits"):
        return hidden.numpy(), np.stack([out.start_logits, out.end_logits], axis=-1)
    logits = next((out[name] for name in ("logits", "prediction_logits", "pooler_output") if name in out), hidden)
    return hidden.numpy(), logits.numpy()


def ours(model, ids, mask, kinds):
    options = {"token_type_ids": jnp.asarray(kinds)} if model.config.type_vocab_size else {}
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, ids, mask):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(ids, mask, **options)
        if getattr(model.config, "n_labels", 1):
            return hidden, model(ids, mask, **options)
        return hidden, model.embed(ids, mask, **options) if model.config.pooler else hidden

    return run(params, jnp.asarray(ids), jnp.asarray(mask))


def load_theirs(folder, kind):
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def inputs(length, seed=0):
    generator = np.random.default_rng(seed)
    ids, kinds = generator.integers(1, 29, (2, length)), generator.integers(0, 2, (2, length))
    mask = np.arange(length) < np.array([[length], [max(1, 2 * length // 3)]])
    return np.where(mask, ids, 0), mask, kinds


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint by transformers: its folder, the model, ours."""
    folder = tmp_path_factory.mktemp("checkpoint")
    kind = request.param.partition(",")[0]
    config = getattr(transformers, "BertConfig" if kind.startswith("Bert") else "ModernBertConfig")
    model = getattr(transformers, kind)(config(**CASES[request.param])).eval()
    randomise(model)
    model.save_pretrained(folder)
    return folder, model, zoo.from_pretrained(folder)


def test_vectors_and_logits_agree(case):
    """Ours in float32, theirs in float64: their own float32 is as far from it."""
    folder, model, mine = case
    model, worst = load_theirs(folder, type(model).__name__).double(), 0.0
    for length in LENGTHS:
        ids, mask, kinds = inputs(length)
        for actual, expected in zip(ours(mine, ids, mask, kinds), theirs(model, ids, mask, kinds), strict=True):
            assert actual.shape == expected.shape
            actual = np.asarray(actual)
            if expected.ndim == 3:
                actual, expected = actual[mask], expected[mask]
            worst = max(worst, np.abs(actual - expected).max())
    print(f"largest difference {worst:.1e}, of numbers of size {expected.std():.2f}")
    assert worst < 5e-5
    assert expected.std() > 0.1


def test_export_is_loaded_and_gives_the_same(case, tmp_path):
    folder, model, mine = case
    zoo.save_pretrained(mine, tmp_path, "transformers")
    written, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    kind = written["architectures"][0]
    replaced = {"BertForPreTraining": "BertForMaskedLM", "BertForQuestionAnswering": "BertForTokenClassification"}
    assert kind == replaced.get(type(model).__name__, type(model).__name__)
    again = load_theirs(tmp_path, kind)
    before = {key.replace("qa_outputs", "classifier"): value for key, value in model.state_dict().items()}
    for key, value in again.state_dict().items():
        assert torch.equal(value, before[key]), key
    batch = inputs(20, seed=1)
    for actual, expected in zip(theirs(again, *batch), theirs(model, *batch), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)  # of equal weights: they round as they run
    trained = {"attention_probs_dropout_prob", "classifier_dropout"}
    told = written.keys() & original.keys() - {"architectures", "id2label", "label2id", "pad_token_id"} - trained
    told -= {"hidden_act", "hidden_activation"}  # of names for one function; both mean the same below
    assert {name: written[name] for name in told} == {name: original[name] for name in told}
    assert bert_layout.read_config(written) == bert_layout.read_config(original)
    if kind == type(model).__name__:
        names = {key: tensor.shape for key, tensor in open_weights(folder).items()}
        assert {key: tensor.shape for key, tensor in open_weights(tmp_path).items()} == names


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_config_with_nothing_but_its_type_means_what_it_means_there(kind):
    config, expected = bert_layout.read_config({"model_type": kind}), transformers.AutoConfig.for_model(kind)
    for raw in (expected.to_dict(), json.loads(expected.to_json_string(use_diff=True))):
        assert bert_layout.read_config(raw) == config


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_narrow_weights_are_kept_on_the_way_through(stored, tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    randomise(model)
    model.to(getattr(torch, stored)).save_pretrained(tmp_path / "theirs")
    mine = zoo.from_pretrained(tmp_path / "theirs")
    assert mine.config.param_dtype == stored
    zoo.save_pretrained(mine, tmp_path / "ours", "transformers")
    again = load_theirs(tmp_path / "ours", "BertForMaskedLM").to(getattr(torch, stored))
    for name, param in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], param), name


def test_classifiers_of_modernbert_come_in_by_their_class(tmp_path):
    kinds = {"SequenceClassification": zoo.SequenceClassifier, "TokenClassification": zoo.TokenClassifier}
    for kind, ours in (kinds | {"QuestionAnswering": zoo.TokenClassifier}).items():
        theirs = getattr(transformers, f"ModernBertFor{kind}")(transformers.ModernBertConfig(**MODERN))
        theirs.save_pretrained(tmp_path / kind)
        model = zoo.from_pretrained(tmp_path / kind)
        assert type(model) is ours
        assert (model.config.head_activation, model.config.head_bias) == ("gelu", False)
