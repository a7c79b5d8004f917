"""Reading of files, archives and the hub into chunks."""

import gzip
import hashlib
import os
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import needs_gpt2
from text_files import DOCS, json_lines, pack_tar, read_documents

from nanogpt.errors import InputError
from nanogpt.interop.gguf_tokenizer import GPT4O_SPLIT
from nanogpt.text import reading
from nanogpt.text.documents import DocumentParser
from nanogpt.text.fast_bpe import PATTERNS
from nanogpt.text.omissions import Omissions
from nanogpt.text.reading import ReadOptions, ValSplit, find_boundary, read_chunks
from nanogpt.text.sources import CONVERTED, download, find_inputs, list_parquet

SPLIT = ValSplit(0.1)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in all formats."""
    folder = tmp_path_factory.mktemp("formats")
    deep = folder / "folder/deep"
    deep.mkdir(parents=True)
    for i, text in enumerate(DOCS):
        (deep / f"{i:03}.{'md' if i % 2 else 'txt'}").write_text(text, encoding="utf-8", newline="\r\n")
    (deep / "picture.png").write_bytes(b"\0")
    (deep / ".hidden.txt").write_text("no")

    first, second = json_lines(DOCS[:150]), json_lines(DOCS[150:])
    (folder / "a.jsonl").write_bytes(json_lines(DOCS)[:-1] + b"\n\n")
    texts = {f"{i:03}.txt": text.encode() for i, text in enumerate(DOCS)}
    pack_tar(folder / "a.tar", "", texts)
    two_streams = gzip.compress(second[:999]) + gzip.compress(second[999:])
    pack_tar(folder / "a.txz", "xz", {"x.jsonl": first, "y.jsonl.gz": two_streams, "z.png": b"?"})
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl", first)
        for name, text in list(texts.items())[150:]:
            archive.writestr(name, text)

    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"n": range(301), "text": [*DOCS, None]}), folder / "a.parquet", row_group_size=70)
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.tar", "a.txz", "a.zip", "folder", "f*/**/*.[mt]*"])
def test_formats_hold_the_same_documents(name: str, formats: Path):
    assert read_documents(formats / name)[0] == DOCS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.tar"])
def test_reading_resumes_after_any_item(name: str, formats: Path):
    (source,) = find_inputs([str(formats / name)], Omissions())
    places = []
    for skip in (0, 1, 127, 128, 150, 299):
        chunks = read_chunks(source, ReadOptions(), SPLIT, skip)
        rest = list(DocumentParser(ReadOptions()).parse(chunks))
        assert [document.text.decode() for document in rest] == DOCS[skip:]
        places = places or [document.place for document in rest]
        assert [document.place for document in rest] == places[skip:]


def test_text_key_names_the_column(tmp_path: Path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCS, "body"))
    parquet.write_table(pa.table({"n": [1], "body": ["a"]}), tmp_path / "b.parquet")
    assert read_documents(tmp_path, text_key="body")[0] == [*DOCS, "a"]
    with pytest.raises(InputError, match=r"b\.parquet: has no column 'text', but n, body"):
        read_documents(tmp_path / "b.parquet")


def test_a_zip_behind_another_is_noticed(tmp_path: Path):
    for name in "ab":
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.txt", name)
    both = (tmp_path / "a.zip").read_bytes() + (tmp_path / "b.zip").read_bytes()
    (tmp_path / "both.zip").write_bytes(both)
    with pytest.raises(InputError, match="holds another archive before"):
        read_documents(tmp_path / "both.zip")
    assert read_documents(tmp_path / "both.zip", skip_bad=True)[0] == ["b"]
    (tmp_path / "program.zip").write_bytes(b"MZ" + (tmp_path / "b.zip").read_bytes())  # one that unpacks itself
    assert read_documents(tmp_path / "program.zip")[0] == ["b"]


def test_conversations_with_tools_are_refused_in_parquet_too(tmp_path: Path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for tools in ("[]", None, "[{}]"):
        table = pa.table({"prompt": ["?"], "completion": ["!"], "tools": pa.array([tools], pa.string())})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert len(read_documents(tmp_path, chat=True, skip_bad=True)[0]) == (tools != "[{}]")


def test_inputs_come_in_the_order_given_and_once(tmp_path: Path):
    """By a path, a quoted glob, a linked folder, another spelling; none is lost."""
    for name in ("in/a.txt", "in/sub/b.txt", "else/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/link").symlink_to(tmp_path / "else")
    (tmp_path / "in/sub/round").symlink_to(tmp_path / "in")
    names = ["in/sub/b.txt", "in/*", "in", "else/../in/a.txt"]
    omissions = Omissions()
    sources = find_inputs([str(tmp_path / name) for name in names], omissions)
    assert [Path(source.name).name for source in sources] == ["b.txt", "a.txt", "c.txt"]
    assert [*omissions.counts] == ["duplicate"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"sub cannot be read \(Permission denied\)"):
        find_inputs([str(tmp_path)], Omissions())


def test_a_dead_link_is_an_error_or_counted(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "dead.txt").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"dead\.txt cannot be read .* --skip_bad=True"):
        find_inputs([str(tmp_path)], Omissions())
    omissions = Omissions()
    (source,) = find_inputs([str(tmp_path)], omissions, skip_bad=True)
    assert Path(source.name).name == "a.txt"
    assert omissions.get("bad") == (1, f"{tmp_path}/dead.txt: cannot be read (No such file or directory)")
    with pytest.raises(InputError, match=r"dead\.txt cannot be read .* with --input"):
        find_inputs([str(tmp_path / "dead.txt")], omissions, skip_bad=True)


def test_a_file_that_is_gone_is_named(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    (source,) = find_inputs([str(tmp_path)], Omissions())
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt: cannot be read \(No such file"):
        list(DocumentParser(ReadOptions()).parse(read_chunks(source, ReadOptions(), SPLIT)))


def test_an_encrypted_member_is_named(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "one")
        archive.writestr("b.txt", "two")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of the first member
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.zip:a\.txt: cannot be read .*password"):
        read_documents(tmp_path / "a.zip")
    assert read_documents(tmp_path / "a.zip", skip_bad=True)[0] == ["two"]


def test_a_damaged_member_is_named_and_the_others_are_read(tmp_path: Path):
    """In a tar a damaged header looks like the end."""
    pack_tar(tmp_path / "a.tar", "", {"a.txt": b"one", "b.txt.gz": b"?", "c.txt": b"two", "d.txt": b"three"})
    assert read_documents(tmp_path / "a.tar", skip_bad=True)[0] == ["one", "two", "three"]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = data.index(b"in/c.txt")
    data[header + 150] ^= 1  # its checksum
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"b\.txt\.gz: cannot be read"):
        read_documents(tmp_path / "a.tar")
    texts, omissions = read_documents(tmp_path / "a.tar", skip_bad=True)
    assert texts == ["one"]
    assert omissions.get("bad")[0] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bare", "bare holds no text"),
        ("*.none", "no file matches"),
        ("none.txt", "none.txt cannot be read"),
        ("hf:@x", "is not a dataset on the hub"),
    ],
)
def test_missing_inputs_are_errors(name: str, message: str, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/picture.png").write_bytes(b"\0")
    with pytest.raises(InputError, match=message):
        find_inputs([name if name.startswith("hf:") else str(tmp_path / name)], Omissions())


# --- Pieces


@needs_gpt2
def test_ids_of_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    import tiktoken

    rng = random.Random(0)
    letters = [*"aZéÿ中。ー–…😀9'/ \n!", "\u3000", "\xa0", "\u2009", "'s"]
    gpt2 = tiktoken.get_encoding("gpt2")
    encodings = [gpt2]
    for name, pattern in (("o200k", GPT4O_SPLIT), ("words", PATTERNS["words"])):
        ranks = gpt2._mergeable_ranks
        encodings.append(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))
    cuts = 0
    for _ in range(3000):
        text = "".join(rng.choices(letters, k=12)).encode()
        monkeypatch.setattr(reading, "PIECE_BYTES", len(text))
        end = find_boundary(text + b"a")
        if text[:end].endswith(b"\n"):
            cuts += 1
            for encoding in encodings:
                head, tail = text[:end].decode(), text[end:].decode()
                whole = encoding.encode_ordinary(text.decode())
                assert encoding.encode_ordinary(head) + encoding.encode_ordinary(tail) == whole, text
    assert cuts > 500


# --- The hub


class Hub:
    """Stands for huggingface_hub.HfApi, with these paths on each branch."""

    card: Any = None
    paths: dict[str, list[str]] = {}  # noqa: RUF012

    def dataset_info(self, repo: str, revision: str, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        siblings = []
        for path in self.paths[revision]:
            lfs = SimpleNamespace(sha256=f"hash of {path}") if path.endswith(".parquet") else None
            siblings.append(SimpleNamespace(rfilename=path, lfs=lfs, size=5))
        return SimpleNamespace(sha=f"commit of {revision}", siblings=siblings, card_data=self.card)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "card", None)
    monkeypatch.setattr(Hub, "paths", {"main": ["README.md"], CONVERTED: []})
    return Hub


SMALL = [{"split": "train", "path": ["s/a*", "s/b*"]}, {"split": "x", "path": "x"}]
CARD = {
    "configs": [
        {"config_name": "all", "default": True, "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "small", "data_files": SMALL},
        {"config_name": "plain", "data_files": "p/*"},
    ]
}


@pytest.mark.parametrize(
    ("name", "card", "paths"),
    [
        ("hf:o/w", CARD, ["data/1/0.parquet", "data/2/0.parquet"]),
        ("hf:o/w@small:train", CARD, ["s/a.parquet", "s/b.parquet"]),
        ("hf:o/w@plain", CARD, ["p/0.parquet"]),
        ("hf:o/w@other:test", CARD, ["other/test/0000.parquet"]),
        ("hf:o/w", None, ["default/train/0000.parquet"]),
        ("hf:o/w@other:test", None, ["other/test/0000.parquet"]),
    ],
)
def test_hub_files_are_those_of_the_card_or_the_conversion(name: str, card: Any, paths: list[str], hub: type[Hub]):
    main = [f"{path}.parquet" for path in ("data/2/0", "data/1/0", "s/a", "s/b", "s/c", "p/0")] + ["data/1/x.json"]
    converted = ["default/train/0000.parquet", "other/test/0000.parquet", "other/partial-train/0000.parquet"]
    hub.card = card
    hub.paths = {"main": main, CONVERTED: converted}
    sources = find_inputs([name], Omissions())
    assert [source.name for source in sources] == paths
    revision = CONVERTED if paths[0].endswith("0000.parquet") else "main"
    assert {(source.repo, source.revision, source.origin) for source in sources} == {
        ("o/w", f"commit of {revision}", name)
    }
    assert sources[0].sha256 == f"hash of {paths[0]}"

    hub.paths = {}  # stands for no network
    assert find_inputs([name], Omissions(), sources) == sources
    with pytest.raises(InputError, match="could not be listed"):
        find_inputs([name], Omissions())


def test_hub_without_a_complete_set_is_an_error(hub: type[Hub]):
    hub.paths = {"main": [], CONVERTED: ["plain_text/partial-train/0000.parquet"]}
    with pytest.raises(InputError, match="has no complete set of parquet files"):
        find_inputs(["hf:o/w"], Omissions())
    hub.paths = {"main": [], CONVERTED: ["plain_text/train/0000.parquet"]}
    assert len(find_inputs(["hf:o/w"], Omissions())) == 1  # the only configuration


def test_a_damaged_download_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub]):
    hub.paths = {"main": ["t.parquet"]}
    (source,) = list_parquet("all", "o/w", lambda revision, paths, card: paths)
    content = b"content"
    assert (source.repo, source.revision) == ("o/w", "commit of main")

    def fetch(repo: str, name: str, repo_type: str, revision: str, local_dir: Path) -> str:
        (local_dir / name).write_bytes(content)
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(InputError, match=r"t\.parquet was corrupted during the download"):
        download(source, tmp_path)
    assert not list(tmp_path.iterdir())
    assert download(source._replace(sha256=hashlib.sha256(content).hexdigest()), tmp_path).read_bytes() == content
