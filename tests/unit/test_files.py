"""Locks. What is written whole or not at all is in data/test_write.py, text/test_prepare.py and test_export.py."""

from pathlib import Path
from typing import Any

import pytest

from nanogpt.files import is_same_file, lock_file


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
