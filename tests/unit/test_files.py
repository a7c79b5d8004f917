"""Files: what is written is whole, or not there."""

import os
from pathlib import Path
from typing import Any

import pytest

from nanogpt.files import atomic_write, is_same_file, lock_file


def test_atomic_write_keeps_the_old_file_if_the_block_raises(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as partial, partial.open("w") as file:
        file.writelines(["half", None])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_lock_is_on_the_file_that_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not on one that was moved away between being opened and being locked."""
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "lock"
    flock, moves = fcntl.flock, [path.with_name("moved")]

    def move_first(*args: Any) -> None:
        if moves:
            path.rename(moves.pop())
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", move_first)
    lock = lock_file(path)
    assert lock
    assert is_same_file(path, lock.fileno())
    assert lock_file(path) is None
    lock.close()
    assert lock_file(path)
