"""JSON nested 20,000 deep is a RecursionError in Python and a segmentation fault in C: it is one line, everywhere."""

import pyarrow
import pyarrow.parquet
import pytest

from experiments.causal.text_ends import published_ends
from experiments.data.tables import class_names
from experiments.data.tokenizers import ByteTokenizer

DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_ends_a_text_is_looked_for_in_a_deep_file(name, tmp_path):
    """What users met: `sample` of a folder of somebody else's ends in a traceback."""
    (tmp_path / name).write_text(f'{{"eos_token_id": {DEEP}}}')
    with pytest.raises(ValueError, match=f"{name} is not JSON: brackets are nested too deep"):
        published_ends(tmp_path, ByteTokenizer(), 257)


@pytest.mark.parametrize("said", [DEEP, "no JSON", "[]", '{"info": {"features": []}}'])
def test_what_a_table_says_of_its_columns_may_be_nonsense(said, tmp_path):
    """What users met: a table that any other program reads cannot be opened for what stands beside it."""
    table = pyarrow.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": said})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert class_names(tmp_path / "t.parquet") == {}
