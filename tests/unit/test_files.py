"""Files: what is written is whole, or not there."""

import os
from pathlib import Path

import pytest

from nanogpt.files import atomic_write


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
