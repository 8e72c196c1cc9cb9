"""JSON nested deeper than the libraries follow is named before they read it."""

import gzip
import json

import pytest

from experiments.data import data_source, deep_json
from experiments.data.deep_json import refuse_deep_json
from experiments.data.documents import DataConfig, open_source
from experiments.data.tables import read_rows
from experiments.data.text_files import BadFile

DEEP = '{"text": ' + "[" * 20_000 + "]" * 20_000 + "}\n"


@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_deep_json_is_named_and_long_json_is_not(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(deep_json, "_CHUNK", chunk)
    (tmp_path / "lines.jsonl").write_text('{"text": "a smile is :[ or :{"}\n' * 600)
    (tmp_path / "whole.json").write_text(json.dumps({"data": [{"text": [[1], [2, [3]]]}] * 300}, indent=1))
    (tmp_path / "notes.txt").write_text(DEEP)
    refuse_deep_json(tmp_path)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(DEEP.encode()))
    with pytest.raises(BadFile, match=r"'packed.jsonl.gz' nests brackets deeper than 1,000"):
        refuse_deep_json(tmp_path)


def test_the_readers_say_so_in_a_line(tmp_path):
    """The library datasets ends the process."""
    (tmp_path / "train.jsonl").write_text(DEEP)
    with pytest.raises(ValueError, match=r"--data.hub '.*': 'train.jsonl' nests brackets deeper"):
        open_source(DataConfig(hub=str(tmp_path)))
    with pytest.raises(ValueError, match=r"--data.hub .* cannot be loaded \('train.jsonl' nests brackets deeper"):
        data_source.load_hub(str(tmp_path))
    with pytest.raises(BadFile, match=r"line 1 of train is not JSON .brackets are nested too deep"):
        list(read_rows(tmp_path / "train.jsonl", "train"))
