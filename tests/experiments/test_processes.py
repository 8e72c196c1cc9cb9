"""Every command that trains gives by two processes what it gives by one."""

import json

import numpy as np
import pytest

from experiments.loop.metrics import read_metrics
from tests.experiments.loop.test_distributed import arrays_of, run, steps_of
from tests.experiments.retrieval.test_beir import write_beir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

MODEL = "--model.d-model 16 --model.n-layers 1 --model.pattern attn/mlp --model.attn.head-dim 8 --model.mlp.d-ff 16"
LOOP = "--train.no-tensorboard --train.log-every 1 --train.batch-size 4 --train.save-every 2"
LENGTHS = "--tokenizer bytes --max-query-len 24 --max-doc-len 32"
M2 = "--model.d-model 16 --model.n-layers 1 --model.pattern m2/monarch --model.m2.filter.order 8"
NEEDLES = "--tokenizer bytes --max-query-len 24 --needle-len 12 --lengths 24 40 --train-lengths 24 --depths 0 1"
COMMANDS = {
    "vit": f"vit tiny --data.path squares {MODEL} --model.patch-size 2 --threads 2 {LOOP} --steps 4",
    "vit m2": f"vit tiny --data.path squares {M2} --model.patch-size 2 --threads 2 {LOOP} --steps 4",
    "synthetic": "synthetic parity --model.d-model 8 --model.n-layers 1 --model.pattern mamba/mlp --data.length 8 "
    f"--data.min-length 3 --data.max-eval-length 64 --eval-sequences 16 {LOOP} --steps 4",
    "pretrain": f"bert pretrain tiny --data.path my.txt {MODEL} --data.tokenizer bytes --data.seq-len 64 {LOOP} "
    "--steps 4 --train.eval-every 2 --eval-batches 2",
    "pretrain m2": f"bert pretrain tiny --data.path my.txt {M2} --data.tokenizer bytes --data.seq-len 64 {LOOP} "
    "--steps 2 --eval-batches 2",
    "finetune": f"bert finetune tiny --data.path words {MODEL} --data.tokenizer bytes --max-len 32 {LOOP} --epochs 2",
    "retrieve": f"bert retrieve tiny --data.path beir {MODEL} {LENGTHS} {LOOP} --steps 4 --train.eval-every 4",
    "needles": f"needles tiny --data.path beir {MODEL} {NEEDLES} --eval-queries 6 {LOOP} --steps 4 "
    "--train.eval-every 4",
    "distill": f"distill tiny --data.path my.txt --data.seq-len 32 --teacher-steps 2 --eval-batches 2 {LOOP} "
    "--layers.steps 2 --qkv.steps 0 --logits.steps 2",
}


@pytest.fixture
def data(empty_folder, squares):
    """What the commands read, in the current folder."""
    (empty_folder / "my.txt").write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    write_beir(empty_folder / "beir", words=4)
    rows = [{"text": f"{'xy'[i % 2]} {i // 2}", "label": ("left", "right")[i % 2]} for i in range(30)]
    (empty_folder / "words").mkdir()
    for split, some in (("train", rows[:16]), ("validation", rows[16:23]), ("test", rows[23:])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (empty_folder / "words" / f"{split}.jsonl").write_text(lines)
    return empty_folder


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_give_what_one_gives(name, data):
    command, *rest = COMMANDS[name].split()
    for folder, count in (("one", 1), ("two", 2)):
        words = ["-m", f"experiments.{command}", *rest, "--run-dir", str(data / folder)]
        results = run(count, words, cwd=data)
        assert [status for status, *_ in results] == [0] * count, results
        assert not any(output for _, output, _ in results[1:])
    one, two = (data / folder for folder in ("one", "two"))
    here, there = ({path.relative_to(f) for f in [top] for path in f.rglob("*")} for top in (one, two))
    assert {p for p in here ^ there if not {"checkpoints", "params"} & {*p.parts}} == set()
    for folder in [path.parent for path in one.rglob("metrics.jsonl")]:
        other = two / folder.relative_to(one)
        pairs = zip(read_metrics(folder), read_metrics(other), strict=True)
        for mine, theirs in pairs:
            assert mine.keys() == theirs.keys()
            for metric in (m for m in mine if "second" not in m and m not in ("time", "split")):
                np.testing.assert_allclose(theirs[metric], mine[metric], rtol=2e-5, atol=2e-5, err_msg=metric)
        step = steps_of(folder)[-1]
        mine, theirs = arrays_of(folder, step), arrays_of(other, step)
        assert mine.keys() == theirs.keys()
        for array in (a for a in mine if a.startswith("params.")):
            rms = lambda x: np.sqrt(np.mean(np.square(x)))  # noqa: E731
            assert rms(theirs[array] - mine[array]) <= 1e-4 * rms(mine[array]) + 1e-5, array
