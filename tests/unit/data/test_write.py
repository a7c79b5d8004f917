"""Writing datasets: a broken or killed write leaves the old dataset or none; texts and downloads."""

import contextlib
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from nanogpt.data.dataset import open_dataset
from nanogpt.data.write import download, write_dataset, write_text
from nanogpt.errors import InputError
from nanogpt.text.fast_bpe import make_byte_level_bpe
from nanogpt.text.streams import read_text
from nanogpt.text.tokenizer import Tokenizer

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 30
CUT = len(TEXT) * 9 // 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "york", TEXT, Tokenizer.characters(TEXT))
    return tmp_path / "york"


def test_a_broken_write_keeps_the_old_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = Tokenizer.characters("0123456789")

    def breaks():
        yield np.arange(5)
        raise OSError("disk full")

    with pytest.raises(InputError, match=r"york could not be written \(disk full\): free some .* --out"):
        write_dataset(folder, {"train": [np.arange(9)], "val": breaks()}, other)
    with pytest.raises(InputError, match=r"the val split would be empty"):
        write_dataset(folder, {"train": [np.arange(9)], "val": [np.arange(0)]}, other)
    with pytest.raises(InputError, match=r"train\.bin could not be written \(.*File exists"):
        write_text(folder / "train.bin", "0123456789", other)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # of tokenizer.json and meta.json, after the ids
        with pytest.raises(InputError, match="could not be written"):
            write_text(folder, "0123456789" * 99, other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_normalizer_that_changes_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    write_text(tmp_path, "abAB" * 100, Tokenizer(inner))
    assert "the tokenizer's normalizer changes some characters: Lowercase" in capsys.readouterr().out


@pytest.mark.parametrize("moment", range(10))
def test_a_kill_between_two_renames_leaves_nothing_mixed(folder: Path, moment: int, monkeypatch: pytest.MonkeyPatch):
    new, tokenizer = "0123456789" * 99, Tokenizer.characters("0123456789")
    steps = iter(range(moment))
    real_replace, real_unlink = os.replace, Path.unlink

    def or_die(action):
        def step(*args, **kwargs):
            if next(steps, None) is None:
                raise SystemExit
            return action(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", or_die(real_replace))
        patch.setattr(Path, "unlink", lambda self, **kw: or_die(real_unlink)(self, **kw))
        with pytest.raises(SystemExit):
            write_text(folder, new, tokenizer)
    with contextlib.suppress(InputError):
        data = open_dataset(folder, block_size=8, verify=True)
        assert data.tokenizer is not None
        texts = data.tokenizer.decode(data.train[:].tolist()), data.tokenizer.decode(data.val[:].tolist())
        assert texts in ((TEXT[:CUT], TEXT[CUT:]), (new[:891], new[891:]))


def test_write_text_counts_what_the_tokenizer_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = Tokenizer(make_byte_level_bpe({"a": 0, "b": 1}, [], [], []))
    meta = write_text(tmp_path, "abc" * 10, tokenizer)
    assert meta["omitted"]["unencodable"][0] == 10
    assert "does not have them: 10;" in capsys.readouterr().out


def test_read_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):  # by its mark
        path.write_bytes("é\r\nb\rc\n".encode(encoding))
        assert read_text(path) == "é\nb\nc\n"
    path.write_bytes("abcd".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"a\.txt: is binary, not text: .* it looks like utf-16-le"):
        read_text(path)


def test_fetch(tmp_path: Path):
    content = os.urandom(3 << 20)
    digest = hashlib.sha256(content).hexdigest()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path != "/none" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 1 << 20] if self.path == "/breaks" else content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, path = f"http://127.0.0.1:{server.server_port}", tmp_path / "new/input.txt"
        for bad, sha256, message in (
            ("none", digest, r"could not be downloaded .*404.*--input=FILE"),
            ("breaks", digest, r"could not be downloaded .*IncompleteRead"),
            ("good", "0" * 64, r"input\.txt is not the expected file .*delete it"),
        ):
            with pytest.raises(InputError, match=message):
                download(f"{url}/{bad}", path, sha256)
            assert path.exists() == (bad == "good")
        path.unlink()
        assert download(f"{url}/good", path, digest).read_bytes() == content
        server.shutdown()
    assert download(f"{url}/good", path, digest) == path  # there already: no network needed
    path.write_bytes(b"edited")
    with pytest.raises(InputError, match=r"not the expected file .*delete it"):
        download(f"{url}/good", path, digest)
    with pytest.raises(InputError, match=r"could not be downloaded .*--input=FILE"):
        download(f"{url}/good", tmp_path / "x", digest)
