"""Small folders of sentence-transformers, and the vectors that it makes with them.

sentence_vectors.json holds what sentence-transformers 6.2.0 (torch 2.14.1, transformers 5.24.0) writes beside
tests/published/bert_sentence under a vocabulary of `words`, its versions and the options of no effect left out, and
what its `encode` gives for `texts`: "plain"; "query" and "document", of `encode_query` and `encode_document`;
"passage", of `prompt_name="passage"`; "own", of `prompt="a : "`; "normalized", of `normalize_embeddings=True`. The
weight of a Dense module in row i and column j is sin(1 + 7 i + 3 j) / 2, its bias cos(i) / 4, of a residual
sin(2 + 5 i + 3 j) / 2. The length of normalize-short is where versions before 6 say it, too.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from tests.places import PUBLISHED
from zoo.published.weight_files import save_weights

FACTS = json.loads((Path(__file__).parent / "sentence_vectors.json").read_text())
TEXTS, FOLDERS = FACTS["texts"], FACTS["folders"]


def write_folder(folder, name):
    """The folder of a name, on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(PUBLISHED / "bert_sentence" / file, folder / file)
    (folder / "vocab.txt").write_text("\n".join(FACTS["words"]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    for file, content in FOLDERS[name]["files"].items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content))
        if "_Dense" in file:
            write_dense((folder / file).parent, content)
    return folder


def write_dense(folder, said):
    i, j = np.mgrid[: said["out_features"], : said["in_features"]].astype(np.float64)
    tensors = {"linear.weight": np.sin(1 + 7 * i + 3 * j) / 2}
    if said["bias"]:
        tensors["linear.bias"] = np.cos(i[:, 0]) / 4
    if said.get("use_residual") and said["in_features"] != said["out_features"]:
        tensors["residual.weight"] = np.sin(2 + 5 * i + 3 * j) / 2
    save_weights(folder, {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
