"""A run whose folder cannot be written any more goes on elsewhere, and is resumed from there as if nothing had been."""

import contextlib
import errno
import json
import signal
import tempfile

import pytest

from experiments.loop.checkpoints import Checkpoints
from experiments.loop.flags import UsageError
from experiments.loop.metrics import Metrics, read_metrics
from experiments.loop.rescue import rescue_places
from experiments.loop.train import train
from tests.experiments.loop.deleting import delete_under_a_run
from tests.experiments.loop.test_train import OPTIM, as_numbers, assert_identical, make_config, make_task


class At:
    """Batches; when those of some numbers are asked for, something happens."""

    def __init__(self, batches, happens):
        self.batches, self.happens = batches, happens
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self.happens.get(self.batches.number, lambda: None)()
        return next(self.batches)


def begin(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"of": "the run"}')


@pytest.fixture
def full(monkeypatch):
    """Makes what lies in a folder from now on a full disk: a checkpoint, or a line of the metrics, is not written."""
    folders = []
    save, write = Checkpoints.save, Metrics.write

    def refuse(path):
        if any(path.is_relative_to(folder) for folder in folders):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_save(self, *args, **options):
        refuse(self.root)
        return save(self, *args, **options)

    def full_write(self, *args, **options):
        refuse(self.folder)
        return write(self, *args, **options)

    monkeypatch.setattr(Checkpoints, "save", full_save)
    monkeypatch.setattr(Metrics, "write", full_write)
    return folders.append


def taken_away(folder):
    """The folder is deleted, and a file is in its place."""
    while not folder.is_file():
        delete_under_a_run(folder)
        with contextlib.suppress(IsADirectoryError):  # a checkpoint came between
            folder.write_text("no folder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to: its state, and the losses of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    return as_numbers(train(make_task(), make_config(7), OPTIM, folder).state), losses(folder)


def losses(folder):
    return [(r["step"], r["loss"]) for r in read_metrics(folder) if r["split"] == "train"]


@pytest.mark.parametrize("how", ["full", "taken away"])
def test_the_run_goes_on_elsewhere_and_is_resumed_from_there(how, full, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    begin(folder)
    task = make_task()
    happens = (lambda: full(folder)) if how == "full" else (lambda: taken_away(folder))
    batches = At(task.batches, {3: happens, 5: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(
        UsageError, match=r"trained to step 6 of 7, but .*run \(.*\) could not be written any more; it is"
    ):
        train(task._replace(batches=batches), make_config(7), OPTIM, folder)
    elsewhere = tmp_path / "run.rescued"
    assert f"{folder} cannot be written any more (" in (said := capsys.readouterr().out)
    assert f"the run goes on in {elsewhere}" in said
    assert json.loads((elsewhere / "config.json").read_text()) == {"of": "the run"}
    resumed = train(make_task(), make_config(7), OPTIM, elsewhere)
    assert "resumed from step 6" in capsys.readouterr().out
    assert_identical(as_numbers(resumed.state), whole[0])
    assert losses(elsewhere) == whole[1]


def test_the_places_are_asked_for_or_beside_or_temporary_and_new(tmp_path):
    temporary = tempfile.gettempdir()
    run = tmp_path / "run"
    (tmp_path / "run.rescued").mkdir()
    assert next(rescue_places(run, None)) == tmp_path / "run.rescued-2"
    first, last = rescue_places(run, tmp_path / "asked")
    assert first == tmp_path / "asked" / "run.rescued"
    assert str(last.parent) == temporary


def test_a_run_that_can_be_written_nowhere_says_where_it_was_tried(full, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    begin(tmp_path / "run")
    full(tmp_path)
    with pytest.raises(OSError, match=r"be written nowhere: .*run \(No space.*run.rescued \(.*temporary/run.r"):
        train(make_task(), make_config(2), OPTIM, tmp_path / "run")


def test_the_runs_of_a_folder_are_rescued_with_what_lies_around_them(full, tmp_path):
    seeds = tmp_path / "seeds"
    for place in (seeds, seeds / "seed-0"):
        begin(place)
    task = make_task()
    with pytest.raises(UsageError, match=f"--run-dir {tmp_path / 'safe' / 'seeds.rescued'} resumes it"):
        train(
            task._replace(batches=At(task.batches, {1: lambda: full(seeds)})),
            make_config(2, rescue=tmp_path / "safe"),
            OPTIM,
            seeds / "seed-0",
        )
    rescued = tmp_path / "safe" / "seeds.rescued"
    assert (rescued / "config.json").is_file()
    assert Checkpoints(rescued / "seed-0").steps() == [2]
    assert not (tmp_path / "seeds.rescued").exists()
