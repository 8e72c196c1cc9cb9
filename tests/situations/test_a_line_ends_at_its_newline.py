"""U+2028 and U+0085 stand in texts of the web and in names made of them; `str.splitlines` takes them for line ends."""

import io
import json

import numpy as np
from PIL import Image

from experiments.retrieval.beir import read_beir
from experiments.vision.predict import find_images

NAMES = ["a\u2028b", "c\u0085d", "e\x1cf"]


def test_ids_of_queries_and_documents_may_hold_any_character(tmp_path):
    """What users met with vocab.txt: every id behind such a line is that of another word."""
    rows = "".join(json.dumps({"_id": name, "text": name}) + "\n" for name in NAMES)
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    (tmp_path / "qrels").mkdir()
    table = "query-id\tcorpus-id\tscore\r\n" + "".join(f"{name}\t{name}\t1\r\n" for name in NAMES)
    (tmp_path / "qrels" / "test.tsv").write_bytes(table.encode())
    assert read_beir(tmp_path).qrels == {"test": {name: {name: 1} for name in NAMES}}


def test_names_of_images_on_standard_input_may_hold_any_character(tmp_path, monkeypatch):
    """What users met: "a" does not exist."""
    files = [tmp_path / f"{name}.png" for name in NAMES]
    for file in files:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(file)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{file}\n" for file in files)))
    assert find_images(("-",)) == files
