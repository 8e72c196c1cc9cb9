"""JSON of others: what it holds, or one line."""

import pytest

from zoo.published.json_files import read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": [1, 2]}', None),
        (b"[1]", "a.json holds list, expected an object"),
        (b"{", "a.json is not JSON: Expecting property name"),
        (b"\xff\xfe{}", "a.json is not JSON: .*codec can't decode"),
        (b"[" * 100_000, "a.json is not JSON: brackets are nested too deep to be followed"),
        (b'{"a":' * 100_000, "a.json is not JSON: brackets are nested too deep to be followed"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a.json is not JSON: Exceeds the limit"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "a.json has more than 1,000 bytes"),
    ],
    ids=["object", "list", "cut", "other encoding", "deep list", "deep object", "long number", "long file"],
)
def test_what_a_file_holds_or_one_line_that_names_it(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    max_bytes = 1000 if message and "more than" in message else 10**6
    if message is None:
        assert read_json(tmp_path / "a.json") == {"a": [1, 2]}
        return
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "a.json", max_bytes=max_bytes)
    assert "\n" not in str(error.value)
