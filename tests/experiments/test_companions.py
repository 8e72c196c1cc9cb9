"""What lies beside a model's weights is copied by name, and is what it seems."""

import pytest

from experiments import companions
from experiments.companions import copy_companions, find_companions


def test_files_of_known_names_are_copied_and_no_others(tmp_path):
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("tokenizer.json", "vocab.txt", "tokenizer.exe", "vocab.sh", "notes.md", "1_Pooling/config.json"):
        (folder / name).write_text(name)
    copy_companions(find_companions(folder, (*companions.NAMES, "[0-9]*/config.json")), folder, tmp_path / "out")
    copied = {p.relative_to(tmp_path / "out").as_posix(): p.read_text() for p in (tmp_path / "out").rglob("*.*")}
    assert copied == {name: name for name in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json")}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/etc/hostname", "tokenizer_config.json leads out of the folder; remove it"),
        ("/dev/zero", "tokenizer_config.json is a pipe, a socket or a device; remove it"),
        (".", "tokenizer_config.json is a folder"),
        ("vocab.txt", "has 2,000 bytes, more than the 1,000 that such a file may have"),
    ],
)
def test_what_is_not_what_it_seems_is_named(target, message, tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "MAX_BYTES", 1000)
    (tmp_path / "vocab.txt").write_text("x" * 2000)
    (tmp_path / "tokenizer_config.json").symlink_to(target)
    with pytest.raises(ValueError, match=message):
        find_companions(tmp_path, ["tokenizer_config.json"])
