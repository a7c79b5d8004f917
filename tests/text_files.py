"""Documents, and files that hold them."""

import json
import tarfile
from pathlib import Path

DOCS = [f"Document {i}.\n" + "word " * (i % 40) + chr(0x4E00 + i) + "\nGröße 😀\n" for i in range(300)]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, key: text}) + "\n" for text in texts).encode()


def pack_tar(path: Path, compression: str, members: dict[str, bytes]) -> None:
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in members.items():
            file = path.parent / "member"
            file.write_bytes(data)
            archive.add(file, f"in/{name}")
            file.unlink()
