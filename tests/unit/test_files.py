"""Locks and reports. Atomic writes are in data/test_write.py, text/test_prepare.py and test_export.py."""

from pathlib import Path
from typing import Any

import pytest

from nanogpt.errors import InputError
from nanogpt.files import check_report, is_same_file, lock_file


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


def test_check_report_changes_no_file(tmp_path: Path):
    old = tmp_path / "old.json"
    old.write_text("{}")
    check_report("to", str(old))
    check_report("to", str(tmp_path / "new.json"))
    for wrong in (tmp_path, tmp_path / "no/x.json"):
        with pytest.raises(InputError, match=r"^--to=.*: cannot be written \(.*\); give another file"):
            check_report("to", str(wrong))
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "{}"
