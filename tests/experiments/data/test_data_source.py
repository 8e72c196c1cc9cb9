"""What is on this machine is read without asking anybody."""

import csv
import dataclasses
import json
import socket

import huggingface_hub.constants
import numpy as np
import pytest

from experiments import causal_lm
from experiments.data import data_source
from experiments.data.corpus import DataConfig, load_corpus
from experiments.data.images import ImagesConfig, load_images
from experiments.data.labelled import LabelledConfig, load_labelled


@pytest.fixture
def asked(empty_folder, monkeypatch):
    """Addresses that were asked for; none answers. Nothing is said to be offline."""
    addresses: list = []

    def refuse(*arguments, **options):
        addresses.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data_source.datasets_library().config, "HF_HUB_OFFLINE", False)
    return addresses


def write_rows(folder, kind):
    rows = [{"text": f"row {i} of a text " * 20, "label": ["yes", "no"][i % 2]} for i in range(40)]
    folder.mkdir()
    if kind == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with (folder / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return str(folder / f"train.{kind}")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_local_files_are_read_without_a_network(kind, asked, tmp_path):
    path = write_rows(tmp_path / "rows", kind)
    load_corpus(DataConfig(path=path, seq_len=16))
    load_corpus(DataConfig(hub=str(tmp_path / "rows"), seq_len=16))
    load_labelled(LabelledConfig(path=path))
    load_labelled(LabelledConfig(hub=str(tmp_path / "rows")))
    assert asked == []


def test_local_images_are_read_without_a_network(asked, tmp_path):
    (tmp_path / "images").mkdir()
    arrays = {"images": np.zeros((20, 4, 4), np.uint8), "labels": np.arange(20) % 2}
    np.savez(tmp_path / "images" / "train.npz", **arrays)
    load_images(ImagesConfig(path=str(tmp_path / "images")))
    load_images(ImagesConfig())
    assert asked == []


def test_a_run_on_a_local_file_opens_no_socket(asked, tmp_path):
    tiny = causal_lm.PRESETS["tiny"][1]
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, d_model=8, n_layers=1, pattern="-/mlp"),
        data=dataclasses.replace(tiny.data, path=write_rows(tmp_path / "rows", "jsonl"), seq_len=16),
        train=dataclasses.replace(tiny.train, steps=1, batch_size=2),
        eval_batches=1,
    )
    causal_lm.fit(config, tmp_path / "run")
    assert asked == []


def test_the_library_of_data_sets_counts_for_nobody(asked):
    datasets = data_source.datasets_library()
    datasets.load.increase_load_count("json")
    assert asked == []
