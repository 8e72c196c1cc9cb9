"""Vectors of texts: their order, their batches, what a file of them becomes, and mistakes."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax import nnx

import zoo
from experiments import bert
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.encoder_inputs import encode
from experiments.loop import runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import TrainState, split_model
from experiments.retrieval import embed
from tests.experiments.data.texts import compress
from tests.numerics import assert_close, jitted, with_random_parameters

TOKENIZER = ByteTokenizer()
# Lengths on both sides of every bucket's edge (32, 64, 100), not in order.
TEXTS = ["a" * 40, "hello", "b" * 98, "", "c" * 30, "d" * 31, "the same", "e" * 200, "hello"]


def make_model(head=zoo.SequenceClassifierConfig, **fields):
    config = {"d_model": 16, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": 260, "norm_eps": 1e-6} | fields
    config |= {"attn": zoo.AttentionConfig(head_dim=8), "mlp": zoo.MLPConfig(d_ff=32)}
    model = zoo.MaskedLM if head is zoo.MaskedLMConfig else zoo.SequenceClassifier
    return with_random_parameters(lambda: model(head(**config), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return make_model(n_labels=0, pool="mean", pooler=False, max_len=100)


def alone(model, text, max_len=100):
    """The vector of a text by itself, without padding."""
    tokens = encode(TOKENIZER, [text], max_len=max_len)[0].tokens
    embed, params = jitted(model, "embed")
    return embed(params, jnp.asarray(tokens)[None])[0]


def test_vectors_come_in_the_order_of_the_texts_whatever_the_batches(model):
    expected = np.stack([alone(model, text) for text in TEXTS])
    for batch_tokens in (1, 128, 16384):
        assert_close(embed.embed_texts(model, TOKENIZER, TEXTS, batch_tokens=batch_tokens), expected)
    assert embed.embed_texts(model, TOKENIZER, []).shape == (0, 16)


def test_normalized_vectors_have_length_1(model):
    vectors = embed.embed_texts(model, TOKENIZER, TEXTS, normalize=True)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    plain = embed.embed_texts(model, TOKENIZER, TEXTS)
    assert np.allclose(vectors, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)


def test_short_texts_are_in_short_rows(model):
    encoded = encode(TOKENIZER, TEXTS, max_len=100)
    rows = embed.make_rows(encoded, special_tokens(TOKENIZER), model.config, 100)
    seen, shapes = [], set()
    for batch in embed._batches(rows, 256, 1):
        shapes.add(rows(batch)["tokens"].shape)
        seen += batch[batch >= 0].tolist()
    assert sorted(seen) == list(range(len(TEXTS)))
    assert all(np.prod(shape) <= 256 for shape in shapes)
    assert {length for _, length in shapes} == {32, 64, 100}


def test_a_model_that_takes_padding_for_text_gets_full_rows():
    model = make_model(n_labels=0, pool="first", max_len=48, mask_padding=False)
    tokens = encode(TOKENIZER, ["hello"], max_len=48)[0].tokens
    padded = np.pad(tokens, (0, 48 - len(tokens)), constant_values=special_tokens(TOKENIZER).pad)
    expected = model.embed(jnp.asarray(padded)[None])
    assert_close(embed.embed_texts(model, TOKENIZER, ["hello"]), expected)
    assert_close(embed.embed_texts(model, TOKENIZER, ["hello"], max_len=10), expected)
    assert not np.allclose(expected[0], alone(model, "hello"), atol=1e-3)


@pytest.mark.slow
def test_a_model_without_a_pooling_gets_one():
    model = make_model(zoo.MaskedLMConfig)
    hidden = model.hidden(jnp.asarray(encode(TOKENIZER, ["hello"], max_len=10)[0].tokens)[None])
    for pool, expected in (("first", hidden[:, 0]), ("mean", hidden.mean(1)), ("last", hidden[:, -1])):
        assert_close(embed.embed_texts(model, TOKENIZER, ["hello"], pool=pool), expected)
    assert_close(embed.embed_texts(model, TOKENIZER, ["hello"]), hidden.mean(1))
    assert embed.embed_texts(model, TOKENIZER, ["hello"], pool="attention").shape == (1, 16)


def test_the_longest_row_is_what_positions_and_filters_allow():
    def config(**fields):
        return zoo.EncoderConfig(d_model=8, n_layers=1, vocab_size=9, **fields)

    assert embed.longest(config(pattern="attn/mlp", max_len=None)) is None
    assert embed.longest(config(pattern="attn/mlp", max_len=77)) == 77
    m2 = zoo.presets["m2-bert-80m"].m2
    assert embed.longest(config(pattern="m2/monarch", max_len=None, m2=m2)) == m2.l_max
    assert embed.longest(config(pattern="m2/monarch", max_len=8, m2=m2)) == 8


def test_more_than_the_model_reads_is_refused(model):
    with pytest.raises(ValueError, match="max_len=101, expected at most 100"):
        embed.embed_texts(model, TOKENIZER, TEXTS, max_len=101)


def save_run(model, folder):
    """A run's folder with a model in it, as if it had been trained."""
    folder.mkdir()
    runs.save_model_config(model.config, folder)
    TOKENIZER.save(folder)
    with Checkpoints(folder) as checkpoints:
        state = TrainState(np.int32(1), split_model(model)[1], {}, jax.random.key(0))
        checkpoints.save(1, state, data_state={}, metrics={"loss": 1.0})
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, model):
    """A run's folder."""
    monkeypatch.chdir(tmp_path)
    return save_run(model, tmp_path / "run")


@pytest.fixture
def command(run_command):
    """Runs `python -m experiments.bert embed`: (exit status, stdout, stderr)."""
    return functools.partial(run_command, bert, "embed")


def write_texts(folder):
    """The same texts in every format."""
    (folder / "t.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"_id": f"n{i}", "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    (folder / "t.csv").write_text("number,body\n" + "".join(f"{i},{t}\n" for i, t in enumerate(TEXTS)))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "t.parquet")


def test_every_format_gives_the_same_vectors_in_both(run, model, command):
    write_texts(run.parent)
    expected = embed.embed_texts(model, TOKENIZER, TEXTS)
    for name, flag in (("t.txt", ()), ("t.jsonl", ()), ("t.csv", ("--text-column", "body")), ("t.parquet", ())):
        status, out, err = command("run", name, f"{name}.npy", *flag)
        assert status == 0, err
        assert "9 vectors of 16 numbers" in out
        assert_close(np.load(f"{name}.npy"), expected)
    status, _, err = command("run", "t.jsonl", "out.parquet", "--normalize")
    assert status == 0, err
    table = pyarrow.parquet.read_table("out.parquet").to_pydict()
    assert table["id"] == [f"n{i}" for i in range(9)]
    assert table["text"] == TEXTS
    assert_close(np.array(table["vector"]), expected / np.linalg.norm(expected, axis=1, keepdims=True))
    assert not [path for path in run.parent.iterdir() if path.name.startswith(".")]


def test_texts_may_be_compressed_and_of_another_encoding(tmp_path):
    text = "déjà vu\r\nein\x0cTag\n" + "plain\n" * 30
    for suffix in (".gz", ".zst"):
        (tmp_path / f"t.txt{suffix}").write_bytes(compress(text.encode("cp1252"), suffix))
        texts = embed.read_texts(tmp_path / f"t.txt{suffix}", "text", "cp1252")[1]
        assert texts == ["déjà vu", "ein\x0cTag", *["plain"] * 30]
    (tmp_path / "t.txt").write_bytes(text[:8].encode("cp1252"))
    with pytest.raises(ValueError, match=r"t.txt is not utf-8 text .*; --encoding cp1252 may be its encoding"):
        embed.read_texts(tmp_path / "t.txt", "text")


def test_nothing_is_overwritten_unasked_and_a_failure_leaves_what_was_there(run, monkeypatch, command):
    write_texts(run.parent)
    (run.parent / "out.npy").write_text("precious")
    status, _, err = command("run", "t.txt", "out.npy")
    assert (status, err.count("\n")) == (1, 1)
    assert "out.npy is there already; --overwrite replaces it" in err
    with monkeypatch.context() as patched:

        def fail(*_):
            raise OSError("no space left")

        patched.setattr(embed.np, "save", fail)
        status, _, err = command("run", "t.txt", "out.npy", "--overwrite")
    assert status == 1
    assert (run.parent / "out.npy").read_text() == "precious"
    assert not [path for path in run.parent.iterdir() if path.name.startswith(".")]
    assert command("run", "t.txt", "out.npy", "--overwrite")[0] == 0
    assert np.load(run.parent / "out.npy").shape == (9, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.txt", "o.npy"], "missing.txt does not exist"),
        (["run", "missing.jsonl", "o.npy"], "missing.jsonl does not exist"),
        (["run", "t.doc", "o.npy"], "t.doc, expected a file that ends in .jsonl, .csv, .parquet"),
        (["run", "empty.txt", "o.npy"], "empty.txt has no texts"),
        (["run", "t.csv", "o.npy"], "t.csv line 1 has no 'text'; --text-column may be number, body"),
        (["run", "numbers.jsonl", "o.npy"], "numbers.jsonl line 2: 'text' is 5, expected a string"),
        (["run", "junk.parquet", "o.npy"], "junk.parquet is no Parquet file"),
        (["run", "t.txt", "o.txt"], "o.txt, expected a name that ends in .npy or .parquet"),
        (["run", "t.txt", "no/where/o.npy"], "no/where is no folder"),
        (["nowhere", "t.txt", "o.npy"], "nowhere"),
        (["run", "t.txt", "o.npy", "--max-len", "1000"], "max_len=1000, expected at most 100"),
        (["run", "t.txt", "o.npy", "--batch-tokens", "0"], "batch_tokens=0, expected at least 1"),
        (["run", "t.txt", "o.npy", "--encoding", "utf-9"], "--encoding utf-9, expected one that Python knows"),
        (["run", "t.txt", "o.npy", "--pool", "max"], "invalid choice 'max'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, run, command):
    write_texts(run.parent)
    (run.parent / "t.doc").touch()
    (run.parent / "empty.txt").touch()
    (run.parent / "junk.parquet").write_text("junk")
    (run.parent / "numbers.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    status, _, err = command(*arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (run.parent / "o.npy").exists()


@pytest.mark.slow
def test_an_encoder_without_a_head_is_pooled_by_its_mean(tmp_path):
    from experiments.retrieval.embedder import load_embedder
    from tests.experiments.retrieval.sentence_folders import write_folder
    from tests.places import PUBLISHED

    bert = write_folder(tmp_path / "bert", "bare")
    modern = tmp_path / "modern"
    shutil.copytree(PUBLISHED / "modernbert_model", modern)
    (modern / "vocab.txt").write_text((bert / "vocab.txt").read_text())
    for folder in (bert, modern):
        assert isinstance(zoo.from_pretrained(folder), zoo.SequenceClassifier)
        assert load_embedder(folder).model.config.pool == "mean"
        model, tokenizer, _ = load_embedder(folder, "first")
        tokens = jnp.asarray(encode(tokenizer, ["the cat"], max_len=9)[0].tokens)[None]
        assert_close(embed.embed_texts(model, tokenizer, ["the cat"]), model.hidden(tokens)[:, 0])


def test_an_encoder_that_was_pooled_in_training_keeps_it(run, model):
    from experiments.retrieval.embedder import load_embedder
    from tests.places import PUBLISHED

    assert load_embedder("run").model.config == model.config
    m2 = run.parent / "m2"
    shutil.copytree(PUBLISHED / "m2_bert_retrieval", m2)
    rows = zoo.from_pretrained(m2).config
    TOKENIZER.save(m2)
    if rows.padded_vocab_size < 260:
        (m2 / "tokenizer.json").unlink()
        (m2 / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    kept = load_embedder(m2).model.config
    assert (kept.pool, kept.pooler) == (rows.pool, rows.pooler)


def test_prompts_stand_before_texts_by_their_words_or_their_name(run, model, command):
    from tests.experiments.retrieval.sentence_folders import FOLDERS, TEXTS, write_folder

    (run.parent / "p.txt").write_text("\n".join(TEXTS) + "\n")
    write_folder(run.parent / "st", "default-prompt")
    for flags_given, kind in (((), "plain"), (("--prompt", "a : "), "own"), (("--prompt-name", "passage"), "passage")):
        status, _, err = command("st", "p.txt", f"{kind}.npy", *flags_given)
        assert status == 0, err
        np.testing.assert_allclose(np.load(f"{kind}.npy"), FOLDERS["default-prompt"][kind], atol=2e-5)
    (run.parent / "t.txt").write_text("hello\n")
    assert command("run", "t.txt", "run.npy", "--prompt", "say ")[0] == 0
    assert_close(np.load("run.npy"), embed.embed_texts(model, TOKENIZER, ["say hello"]))
    status, _, err = command("run", "t.txt", "no.npy", "--prompt-name", "query")
    assert (status, err.count("\n")) == (1, 1)
    assert "prompt_name='query', expected None: the model has no prompts" in err
    status, _, err = command("st", "p.txt", "no.npy", "--prompt-name", "query", "--prompt", "x")
    assert "exclude each other; give one" in err
