"""A folder deleted under a run is written again at the run's next save."""

import json
import shutil
import time

import numpy as np
import pytest

from experiments.loop.checkpoints import Checkpoints
from experiments.loop.metrics import read_metrics
from experiments.loop.train import train
from tests.experiments.loop.deleting import delete_under_a_run
from tests.experiments.loop.test_train import OPTIM, make_config, make_task


class Deleting:
    """Batches; when the one of a number is asked for, the run's folder is deleted, and the one around it."""

    def __init__(self, batches, number, folder):
        self.batches, self.number, self.folder = batches, number, folder
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        if self.batches.number == self.number:
            while not (self.folder / f"checkpoints/{self.number}/record.json").exists():  # it is on its way
                time.sleep(0.01)
            delete_under_a_run(self.folder.parent)
        return next(self.batches)


def deleting(folder, number):
    task = make_task()
    return task._replace(batches=Deleting(task.batches, number, folder))


def test_a_run_whose_folder_is_deleted_writes_it_again_and_loses_nothing(tmp_path, capsys):
    folder = tmp_path / "seeds" / "seed-0"
    folder.mkdir(parents=True)
    for path in (folder, folder.parent):
        (path / "config.json").write_text(json.dumps({"of": str(path)}))
    train(deleting(folder, 4), make_config(6), OPTIM, folder)
    said = capsys.readouterr().out
    assert "the checkpoint of step 4 was deleted under the run; step 6 is saved" in said
    (line,) = [line for line in said.splitlines() if "written again" in line]
    assert "config.json" in line
    for path in (folder, folder.parent):
        assert json.loads((path / "config.json").read_text()) == {"of": str(path)}
    assert Checkpoints(folder).steps() == [6]
    assert [r["step"] for r in read_metrics(folder) if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_begins_again_and_keeps_its_metrics(tmp_path, capsys):
    train(make_task(), make_config(2), OPTIM, tmp_path)
    before = read_metrics(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    capsys.readouterr()
    train(make_task(), make_config(3), OPTIM, tmp_path)
    assert "it begins again; the metrics until now are kept in metrics.before-1.jsonl" in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "metrics.before-1.jsonl").read_text().splitlines()]
    assert kept == before
    assert np.all(np.diff([r["step"] for r in read_metrics(tmp_path)]) >= 0)
