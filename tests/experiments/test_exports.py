"""What an exported model has beside its weights: a tokenizer that others load, and a card that says what it is."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers as hf
from flax import nnx

import zoo
from experiments import causal_lm, convert
from experiments.data.tokenizers import ByteTokenizer, published_tokenizer, save_tokenizer, train_wordpiece
from experiments.encoders import masked_lm
from experiments.loop import runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import TrainState, split_model
from experiments.retrieval.sentence_modules import read_modules
from tests.experiments.encoders.test_load import save_bert
from tests.experiments.retrieval.sentence_folders import write_folder


def save_run(folder, config, model, tokenizer, *, said=None, steps=((1, 2.5), (2, 2.25))):
    """A run's folder, as if it had been trained."""
    save_tokenizer(tokenizer, folder)
    runs.begin(config, folder, said)
    with Checkpoints(folder) as checkpoints:
        for step, loss in steps:
            state = TrainState(np.int32(step), split_model(model)[1], {}, jax.random.key(0))
            checkpoints.save(step, state, data_state={}, metrics={"loss": loss})
    return folder


@pytest.fixture
def byte_run(empty_folder):
    preset = causal_lm.PRESETS["tiny"][1]
    shape = dataclasses.replace(preset.model, d_model=8, n_layers=1)
    config = dataclasses.replace(preset, model=shape, data=dataclasses.replace(preset.data, path="my text.txt"))
    model = zoo.CausalLM(dataclasses.replace(shape, vocab_size=257), rngs=nnx.Rngs(0))
    return save_run(empty_folder / "run", config, model, ByteTokenizer())


def test_a_run_on_bytes_is_exported_with_a_tokenizer_of_bytes(byte_run, run_command, tmp_path):
    status, _, err = run_command(convert, "run", "out", "--layout", "transformers")
    assert status == 0, err
    text = "Grüße, 世界!\n"
    tokenizer = hf.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "README.md"}
    ids = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert ids == {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def test_the_card_says_what_was_trained_how_and_how_well(byte_run, run_command, tmp_path):
    assert run_command(convert, "run", "out", "--checkpoint", 1, "--layout", "transformers")[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    for said in (
        "| parameters | ",
        "| pattern | `mamba` |",
        "Data: `my text.txt`. Checkpoint of step 1.",
        "python -m experiments.causal_lm tiny --model.d-model 8 --model.n-layers 1 --data.path 'my text.txt'",
        "| loss | 2.5 |",
        'AutoModelForCausalLM.from_pretrained("out")',
    ):
        assert said in card
    assert run_command(convert, "run", "best", "--checkpoint", "best")[0] == 0
    assert "| loss | 2.25 |" in (tmp_path / "best/README.md").read_text()
    assert run_command(convert, "out", "back", "--layout", "official")[0] == 0
    card = (tmp_path / "back/README.md").read_text()
    assert "# out" in card
    assert "Training" not in card
    assert "transformers" not in card


def test_an_encoders_run_is_exported_with_the_tokens_around_its_rows(empty_folder, run_command, tmp_path):
    tokenizer = train_wordpiece(["the cat sat on the mat"] * 3, 300)
    preset = masked_lm.PRESETS["tiny"][1]
    attn = zoo.AttentionConfig(n_heads=1, position="none", bias=True)
    mlp = zoo.MLPConfig(d_ff=8, gated=False, activation="gelu", bias=True)
    shape = {"d_model": 8, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": tokenizer.vocab_size, "max_len": 32}
    shape |= {"norm_place": "post", "attn": attn, "mlp": mlp, "pad_vocab_multiple": 1, "type_vocab_size": 2}
    model = zoo.MaskedLM(zoo.MaskedLMConfig(**shape), rngs=nnx.Rngs(0))
    save_run(tmp_path / "run", preset, model, tokenizer, said=model.config)
    status, _, err = run_command(convert, "run", "out", "--layout", "transformers")
    assert status == 0, err
    exported = hf.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert exported.encode("The cat").ids == [2, *tokenizer.encode("The cat"), 3]
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (said["tokenizer_class"], said["model_max_length"]) == ("BertTokenizer", 32)
    assert json.loads((tmp_path / "out/special_tokens_map.json").read_text())["mask_token"] == "[MASK]"
    assert not (tmp_path / "out/generation_config.json").exists()
    assert 'AutoModelForMaskedLM.from_pretrained("out")' in (tmp_path / "out/README.md").read_text()


def test_a_cased_bert_keeps_its_case_through_an_export(empty_folder, run_command, tmp_path):
    save_bert(tmp_path / "bert", tokenizer_config={"do_lower_case": False, "model_max_length": 12})
    status, _, err = run_command(convert, "bert", "out", "--layout", "transformers")
    assert status == 0, err
    assert published_tokenizer(tmp_path / "out").encode("The Café").tolist() == [7, 8]
    assert hf.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("The Café").ids == [2, 7, 8, 3]
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert said == {"do_lower_case": False, "model_max_length": 12}  # as it was published


def test_a_folder_of_sentence_transformers_stays_one(empty_folder, run_command, tmp_path):
    write_folder(tmp_path / "st", "default-prompt")
    listed = json.loads((tmp_path / "st/modules.json").read_text())
    listed.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"})
    (tmp_path / "st/modules.json").write_text(json.dumps(listed))
    status, _, err = run_command(convert, "st", "out", "--layout", "transformers")
    assert status == 0, err
    assert read_modules(tmp_path / "out") == read_modules(tmp_path / "st")
    assert zoo.from_pretrained(tmp_path / "out").config.pool == "mean"
    assert 'SentenceTransformer("out")' in (tmp_path / "out/README.md").read_text()
