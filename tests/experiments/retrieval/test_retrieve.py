"""Retrieval as a user runs it: by its command line, on folders, with mistakes."""

import dataclasses
import functools
import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import zoo
from experiments import bert
from experiments.encoders.load import load_encoder
from experiments.loop import flags
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model
from experiments.retrieval import retrieve
from experiments.retrieval.beir import read_beir
from experiments.retrieval.embed import embed_texts
from experiments.retrieval.ranking import as_run, measure, search
from tests.experiments.retrieval.test_beir import loco_rows, write_beir, write_rows
from tests.experiments.retrieval.test_embed import make_model, save_run

MODEL = (
    "--model.d-model 16 --model.n-layers 1 --model.pattern attn/mlp --model.attn.head-dim 8 --model.mlp.d-ff 32 "
    "--train.no-tensorboard "
)
SMALL = shlex.split(
    f"retrieve tiny --data.path beir {MODEL} --tokenizer bytes --max-query-len 24 --max-doc-len 32 "
    "--train.batch-size 4 --steps 6 --train.save-every 2 --train.eval-every 4 --train.log-every 2"
)


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def data(tmp_path):
    """A folder "beir"."""
    return write_beir(tmp_path / "beir", words=4)


@pytest.fixture
def command(run_command):
    """Runs `python -m experiments.bert ...` in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, bert)


def parameters(folder):
    return jax.tree.leaves(jax.tree.map(np.asarray, split_model(load_encoder(folder).model)[1]))


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def test_learns_evaluates_and_leaves_a_model_whose_vectors_give_the_same_results(data, command):
    longer = ("--steps", 150, "--train.eval-every", 100, "--train.batch-size", 20, "--train.log-every", 50)
    status, out, err = command(*SMALL, *longer, "--optim.learning-rate", 1e-2, "--run-dir", "run")
    assert status == 0, err
    assert "60 documents; queries: 20 train, 20 dev, 20 test" in out
    losses = [record["loss"] for record in read_metrics("run") if record["split"] == "train"]
    assert losses[-1] < 0.5 * np.log(20)
    said = results("run")
    assert (said["split"], said["queries"], said["documents"]) == ("test", 20, 60)
    assert said["bm25"]["mrr@10"] == 1  # each query has a word of its own
    assert f"{said['model']['ndcg@10']:.3f}" in out
    held_out = [record for record in read_metrics("run") if record["split"] == "validation"]
    assert [record["step"] for record in held_out] == [100, 150]
    assert all(record["loss"] == pytest.approx(1 - record["ndcg@10"]) for record in held_out)

    collection = read_beir(data)
    model, tokenizer, _ = load_encoder("run", step="best")
    names = list(collection.qrels["test"])
    queries = embed_texts(
        model, tokenizer, [collection.queries[name] for name in names], max_len=24, normalize=True, batch_tokens=100
    )
    documents = embed_texts(model, tokenizer, list(collection.documents.values()), max_len=32, normalize=True)
    run = as_run(search(queries, documents, 100), names, list(collection.documents))
    assert measure(collection.qrels["test"], run) == pytest.approx(said["model"], abs=1e-6)
    lines = [line.split() for line in Path("run/run.trec").read_text().splitlines()]
    assert len(lines) == 20 * 60
    assert {line[0] for line in lines} == set(names)
    assert [float(line[4]) for line in lines[:60]] == sorted((float(line[4]) for line in lines[:60]), reverse=True)

    status, out, err = command(
        "retrieve", "tiny", "--init", "run", "--data.path", "beir", "--zero-shot", "--run-dir", "z"
    )
    assert status == 0, err
    status, _, err = command(*SMALL, "--run-dir", "z")
    assert (status, err.count("\n")) == (1, 1)
    assert "z holds a run with" in err
    assert not Path("z/checkpoints").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(data, command):
    mined = ("--negatives", 2, "--mine", "bm25", "--mini-batch", 5, "--model.dropout", 0.1, "--max-doc-len", 64)
    assert command(*SMALL, *mined, "--run-dir", "whole", "--train.keep-last", 9)[0] == 0
    shutil.copytree("whole", "stopped")
    for step in (4, 6):
        shutil.rmtree(f"stopped/checkpoints/{step}")
    status, out, err = command(*SMALL, *mined, "--run-dir", "stopped")
    assert status == 0, err
    assert "resumed from step 2" in out
    whole, stopped = parameters("whole"), parameters("stopped")
    assert all(np.array_equal(a, b) for a, b in zip(whole, stopped, strict=True))
    assert results("whole") == results("stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags_",
    [
        "--loss orthogonal --negatives 2 --train.batch-size 1 --pool attention",
        pytest.param("--loss margin-mse --teacher teacher --score dot --negatives 2", marks=pytest.mark.slow),
        pytest.param("--loss prototype --teacher teacher", marks=pytest.mark.slow),
        pytest.param("--loss margin-mse --teacher triples.tsv --pool last --pooler", marks=pytest.mark.slow),
        pytest.param("--score dot --symmetric --pool first --train.accumulate 1", marks=pytest.mark.slow),
    ],
)
def test_every_loss_runs_by_a_flag(flags_, data, command, tmp_path):
    if "teacher teacher" in flags_:
        save_run(make_model(zoo.MaskedLMConfig, d_model=24, max_len=20), tmp_path / "teacher")
    (tmp_path / "triples.tsv").write_text("".join(f"{i}\t-1\tq{i}\td{i}\td{(i + 3) % 60}\n" for i in range(0, 60, 3)))
    flags_ = flags_.replace("--symmetric", "--objective.symmetric")
    status, _, err = command(*SMALL, *shlex.split(flags_), "--steps", 2, "--run-dir", "run")
    assert status == 0, err
    model = load_encoder("run").model
    assert isinstance(model, zoo.SequenceClassifier)
    assert model.config.n_labels == (24 if "prototype" in flags_ else 0)
    assert embed_texts(model, load_encoder("run").tokenizer, ["text"]).shape == (1, 16)


@pytest.mark.slow
def test_goes_on_from_a_pretrained_encoder_and_reaches_longer_documents(data, command, tmp_path):
    save_run(make_model(zoo.MaskedLMConfig, max_len=16), tmp_path / "mlm")
    status, _, err = command(*SMALL, "--init", "mlm", "--steps", 1, "--optim.learning-rate", 1e-30, "--run-dir", "run")
    assert status == 0, err
    before, after = load_encoder("mlm").model, load_encoder("run").model
    assert isinstance(before, zoo.MaskedLM)
    assert (after.config.pool, after.config.n_labels, after.pooler) == ("mean", 0, None)
    table = np.asarray(before.encoder.position_embeddings.embedding[...])
    assert np.allclose(after.encoder.position_embeddings.embedding[...], np.concatenate([table, table]), atol=1e-6)
    # Tuned on, with another pool by its flag.
    status, _, err = command(*SMALL, "--init", "run", "--steps", 1, "--run-dir", "again", "--pool", "last")
    assert status == 0, err
    assert load_encoder("again").model.config.pool == "last"


@pytest.mark.slow
def test_locos_tasks_are_averaged(command, tmp_path):
    documents, queries = loco_rows()
    write_rows(tmp_path / "d.jsonl", documents)
    write_rows(tmp_path / "q.jsonl", queries)
    small = [x for x in SMALL if x not in ("--data.path", "beir")]
    loco = ("--data.loco-documents", "d.jsonl", "--data.loco-queries", "q.jsonl")
    status, out, err = command(*small, *loco, "--steps", 2, "--run-dir", "run")
    assert status == 0, err
    said = results("run")
    assert list(said["tasks"]) == ["alpha", "beta"]
    for who in ("model", "bm25"):
        mean = np.mean([task[who]["ndcg@10"] for task in said["tasks"].values()])
        assert said[who]["ndcg@10"] == pytest.approx(mean)
    assert said["queries"] == sum(task["queries"] for task in said["tasks"].values())
    assert "alpha  model" in out
    published = ("--data.test-share", 1, "--init", "run", "--zero-shot", "--run-dir", "z")
    status, out, err = command("retrieve", "tiny", *loco, *published)
    assert status == 0, err
    assert results("z")["queries"] == 80
    status, _, err = command(*small, *loco, "--data.test-share", 1, "--run-dir", "no")
    assert (status, err.count("\n")) == (1, 1)
    assert "there are no training pairs" in err


def test_every_preset_comes_back_from_json_and_has_a_run_folder(tmp_path):
    for name, (_, config) in retrieve.PRESETS.items():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(retrieve.Config, tmp_path / "config.json") == config
        assert retrieve.default_run_dir(config) == Path("runs/retrieve") / name
    tiny = retrieve.PRESETS["tiny"][1]
    memory = dataclasses.replace(tiny, objective=dataclasses.replace(tiny.objective, mini_batch=2))
    assert retrieve.default_run_dir(memory) == Path("runs/retrieve/tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.path nowhere/at/all", "nowhere/at/all is no folder"),
        ("--data.path only-test", "there are no training pairs"),
        ("--data.path no-dev --data.dev-share 0", "there are no queries to choose a checkpoint by"),
        ("--data.path broken", "train.tsv line 2: there is no document 'd999'"),
        ("--loss prototype", "--teacher None with --loss prototype"),
        ("--loss prototype --teacher nowhere", "nowhere"),
        ("--loss margin-mse --teacher nowhere.tsv", "nowhere.tsv"),
        ("--loss inbatch", "invalid choice 'inbatch'"),
        ("--pool max", "invalid choice 'max'"),
        ("--zero-shot", "--zero-shot, but no --init to evaluate"),
        ("--init nowhere", "nowhere"),
        ("--train.batch-size 1", "--train.batch-size 1 with --loss in-batch and no --negatives: nothing to tell apart"),
        ("--train.accumulate 2", "--train.accumulate 2 with --loss in-batch"),
        ("--max-doc-len 2", "max_doc_len=2, expected at least 3"),
        ("--model.max-len 16", "--max-doc-len 32 with --model.max-len 16: there are no more positions"),
        ("--run-dir .", "--run-dir . is not empty and holds no run"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, data, tmp_path, command):
    write_beir(tmp_path / "only-test", splits=("test",))
    write_beir(tmp_path / "no-dev", splits=("train", "test"))
    path = write_beir(tmp_path / "broken") / "qrels/train.tsv"
    path.write_text(path.read_text().replace("\td0\t", "\td999\t"))
    status, _, err = command(*SMALL, "--run-dir", "run", *shlex.split(arguments))
    assert status != 0
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()


def test_a_test_split_alone_is_evaluated_without_training(command, data, tmp_path):
    save_run(make_model(n_labels=0), tmp_path / "run")
    write_beir(tmp_path / "only-test", splits=("test",))
    zero = ("retrieve", "tiny", "--data.path", "only-test", "--init", "run", "--zero-shot", "--run-dir", "z")
    status, _, err = command(*zero)
    assert status == 0, err
    assert results("z")["queries"] == 60


@pytest.mark.slow
def test_the_first_command_reaches_its_promised_result(command):
    status, _, err = command("retrieve", "tiny", "--run-dir", "run")
    assert status == 0, err
    promised = float(retrieve.__doc__.split("reaches nDCG@10 ")[1].split()[0])
    assert results("run")["model"]["ndcg@10"] == pytest.approx(promised, rel=0.15)
