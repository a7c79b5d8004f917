"""Datasets of text: the same bytes after a kill at any instant and with any number of workers."""

import hashlib
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import ROOT, needs_gpt2, run_script
from text_files import DOCS, documents_of, json_lines, one_thread, pack_tar, read_files

from nanogpt.data import write
from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.text import prepare as prepare_module
from nanogpt.text import reading, streams
from nanogpt.text.chat import Chat
from nanogpt.text.fast_bpe import BYTE_DECODER, EARLIER_GPT2_PATTERN, SAME_WORDS, make_byte_level_bpe
from nanogpt.text.omissions import Omissions
from nanogpt.text.prepare import Job, Position, find_earlier, prepare
from nanogpt.text.reading import ReadOptions, hash_fraction, split_pieces
from nanogpt.text.sources import find_inputs
from nanogpt.text.tokenizer import Tokenizer
from train import TrainConfig


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "worker_pool", one_thread)


def make(out: Path, *inputs: object, tokenizer: str = "byte", **settings: Any) -> dict[str, Any]:
    omissions = Omissions()
    sources = find_inputs([str(name) for name in inputs], omissions, find_earlier(out))
    settings = {"options": ReadOptions(), "workers": 2, "omissions": omissions, **settings}
    return prepare(out, sources, tokenizer, **settings)


# --- The data


@pytest.mark.parametrize("shard_tokens", [1000, 10**6])
def test_shards_are_full_and_hold_the_documents_of_their_split(shard_tokens: int, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCS[:200]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(DOCS[200:]))
    out = tmp_path / "out"
    make(out, tmp_path / "b.jsonl")  # which the next one replaces
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    meta = make(out, *inputs, tokenizer="char", val_share=0.2, shard_tokens=shard_tokens)
    data = open_dataset(out, block_size=8, verify=True)
    assert data.tokenizer is not None
    names = {"meta.json", "tokenizer.json"}
    for split in ("train", "val"):
        texts = documents_of(split, 0.2)
        facts = meta["splits"][split]
        assert data.tokenizer.decode(getattr(data, split)[:].tolist()) == "".join(texts)
        assert (facts["bytes"], facts["documents"]) == (len("".join(texts).encode()), len(texts))
        shards = facts.get("shards") or [facts | {"file": f"{split}.bin"}]
        assert [shard["tokens"] for shard in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
        assert all((out / shard["file"]).stat().st_size == 2 * shard["tokens"] for shard in shards)
        names |= {shard["file"] for shard in shards}
    assert set(os.listdir(out)) == names
    assert ("shards" in facts) == (shard_tokens == 1000)


@pytest.mark.parametrize("share", [None, 0.05, 0.999, 1e-9])
def test_the_end_of_a_single_text_is_for_validation(
    share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tenth of it by default, and one character at least."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 3000)
    text = "Größe 😀\n" * 1000
    pack_tar(tmp_path / "a.tar", "", {"a.txt": text.encode()})
    make(tmp_path / "out", tmp_path / "a.tar", tokenizer="char", val_share=share)
    data = open_dataset(tmp_path / "out", block_size=0, verify=True)
    assert data.tokenizer is not None
    train, val = (data.tokenizer.decode(split[:].tolist()) for split in (data.train, data.val))
    assert train + val == text
    expected = max(1, round((share or 0.1) * len(text.encode())))
    assert expected <= len(val.encode()) < expected + 4


def test_one_character_at_least_is_for_training(tmp_path: Path):
    (tmp_path / "a.txt").write_text("日本", encoding="utf-8")
    meta = make(tmp_path / "out", tmp_path / "a.txt", tokenizer="char", val_share=0.999)
    assert [meta["splits"][split]["bytes"] for split in ("train", "val")] == [3, 3]


def test_a_limit_takes_the_first_documents(tmp_path: Path):
    """And counts what was left out before it."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(DOCS))
    others = {".hidden.txt": b"?", "a.png": b"?"}
    pack_tar(tmp_path / "b.tar", "", others | {f"{i:03}.txt": text.encode() for i, text in enumerate(DOCS)})
    for name, kinds in (("a.jsonl", {"normalized"}), ("b.tar", {"hidden", "unknown.png"})):
        meta = make(tmp_path / "out", tmp_path / name, val_share=0.2, limit=120)
        expected = sum(len(text.encode()) for text in DOCS[:120])
        assert sum(facts["bytes"] for facts in meta["splits"].values()) == expected
        numbers = {kind: number for kind, (number, _) in meta["omitted"].items()}
        assert numbers == dict.fromkeys(kinds | {"unread"}, 1)
    assert "unread" not in make(tmp_path / "out", tmp_path / "a.jsonl", limit=300)["omitted"]


@pytest.mark.parametrize("count", [2, 99])
def test_few_documents_are_in_both_splits(count: int, tmp_path: Path):
    """One moves, which has the lowest hash, or the highest; with enough documents none does."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCS[:count]))
    for share in (1e-9, 0.999999999):
        meta = make(tmp_path / "out", tmp_path / "a.jsonl", val_share=share)
        counts = [meta["splits"][split]["documents"] for split in ("val", "train")]
        assert counts == ([1, count - 1] if share < 0.5 else [count - 1, 1])


def test_the_same_call_makes_nothing_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCS))
    made = make(tmp_path / "out", tmp_path / "a.jsonl", val_share=0.2)
    inode = (tmp_path / "out/train.bin").stat().st_ino
    capsys.readouterr()
    assert make(tmp_path / "out", tmp_path / "a.jsonl", val_share=0.2) == made
    assert "already prepared" in capsys.readouterr().out
    assert (tmp_path / "out/train.bin").stat().st_ino == inode
    (tmp_path / "out/val.bin").unlink()
    assert make(tmp_path / "out", tmp_path / "a.jsonl", val_share=0.2) == made
    assert "will replace it" in capsys.readouterr().out
    assert make(tmp_path / "out", tmp_path / "a.jsonl", val_share=0.3) != made
    assert "will replace it" in capsys.readouterr().out


def test_long_documents_have_the_ids_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "\n".join(DOCS) * 3
    (tmp_path / "a.jsonl").write_bytes(json_lines([text, *DOCS]))
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    make(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.txt", tokenizer="bpe:400", val_share=0.5)
    data = open_dataset(tmp_path / "out", block_size=2)
    assert data.tokenizer is not None
    documents = []
    for split in (data.train, data.val):
        documents += np.split(split[:], np.flatnonzero(split[:] == data.end_of_text) + 1)
    expected = [*data.tokenizer.encode_ordinary(text), data.end_of_text]
    assert [document.tolist() for document in documents].count(expected) == 2


def test_bpe_does_not_learn_from_validation_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    train = documents_of("train", 0.5)
    others = [f"{i} zzz qqq\n" * 20 for i in range(20)]
    long = next(text * 500 for text in others if hash_fraction(next(split_pieces((text * 500).encode()))) < 0.5)
    vals = [documents_of("val", 0.5), [text for text in others if hash_fraction(text.encode()) < 0.5]]
    trained = []
    for k, val in enumerate(vals):
        (tmp_path / f"{k}").mkdir()
        (tmp_path / f"{k}/a.jsonl").write_bytes(json_lines([*train, *val]))
        if k:
            (tmp_path / f"{k}/b.txt").write_text(long)
        make(tmp_path / f"out{k}", tmp_path / f"{k}", tokenizer="bpe:400", val_share=0.5)
        trained.append((tmp_path / f"out{k}/tokenizer.json").read_text())
    assert trained[0] == trained[1]
    with pytest.raises(InputError, match="--tokenizer=bpe:many"):
        make(tmp_path / "out", tmp_path / "0", tokenizer="bpe:many")


def test_bad_conversations_leave_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A template may refuse a conversation after its row was read: ids and mask must stay side by side."""
    encode = Chat.encode

    def refuse(self: Chat, messages: Any) -> Any:
        if messages[0]["content"] == "refused":
            raise ValueError("the chat template refuses it")
        return encode(self, messages)

    monkeypatch.setattr(Chat, "encode", refuse)
    questions = ["refused", *(f"Question {i}?" for i in range(50))]
    rows = [json.dumps({"prompt": question, "completion": "Yes."}) for question in questions]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"line 1: the chat template refuses it; .*--skip_bad"):
        make(tmp_path / "out", tmp_path / "a.jsonl", options=ReadOptions(chat=True))
    meta = make(tmp_path / "out", tmp_path / "a.jsonl", options=ReadOptions(chat=True, skip_bad=True), val_share=0.3)
    assert meta["bad"][0] == 1
    data = open_dataset(tmp_path / "out", block_size=8, verify=True)
    assert data.tokenizer is not None
    targets = data.train[:][data.train.mask(0, len(data.train)) == 1]
    assert set(data.tokenizer.decode(targets.tolist()).split("<|endoftext|>")) == {"Yes.", ""}


def test_messages_that_the_template_changes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As Qwen3's does with the reasoning in earlier answers."""
    tokenizer = Tokenizer.bytes()
    tokenizer.template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
        "{{ '<|endoftext|>' }}{% endfor %}"
    )
    tokenizer.save(tmp_path)
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(1, 9):
            answers = [{"role": "assistant", "content": f"<think>{i}?</think>Yes. "} for i in range(number)]
            print(json.dumps({"messages": [{"role": "user", "content": " Sure? "}, *answers]}), file=file)
    meta = make(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=str(tmp_path), options=ReadOptions(chat=True))
    assert meta["omitted"] == {"changed": [28, f"{tmp_path / 'a.jsonl'}, line 2"]}
    assert "the chat template: 28;" in capsys.readouterr().out


# --- What cannot be used


@pytest.mark.parametrize(
    ("name", "data", "flags", "message"),
    [
        ("empty.txt", b"", [], "the input holds no text"),
        ("empty.jsonl", b"\n\n", [], "the input holds no text"),
        ("short.txt", b"a", [], "the input holds only one document"),
        ("same.jsonl", json_lines(DOCS[:1] * 2), [], "the input holds 2 times the same document"),
        ("a.txt", b"text", ["--encoding=klingon"], "--encoding=klingon: unknown"),
        ("a.txt", b"text", ["--encoding=rot13"], "--encoding=rot13: unknown"),
        ("a.txt", b"text", ["--val_share=1", "--workers=0"], "--val_share=1: must be below 1"),
        ("a.txt", b"text", ["--out="], "--out=FOLDER"),
        ("a.txt", b"text", ["--tokenizer=gpt5"], "there is no tokenizer 'gpt5'"),
    ],
)
def test_bad_input_is_one_error_and_no_dataset(
    name: str, data: bytes, flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / name).write_bytes(data)
    argv = ["prepare.py", "--input", tmp_path / name, f"--out={tmp_path / 'out'}", "--tokenizer=char", *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    with pytest.raises(InputError, match=re.escape(message)):
        runpy.run_path(str(ROOT / "data/prepare.py"))["main"]()
    with pytest.raises(InputError, match=r"there is no dataset|its preparation is not finished"):
        open_dataset(tmp_path / "out", block_size=8)


def test_skipped_rows_and_files_are_in_meta(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = json_lines(DOCS)
    (tmp_path / "a.jsonl").write_bytes(lines[:5000] + b"\n" + lines[5000:])  # one row becomes two bad ones
    (tmp_path / "b.txt").write_bytes(b"\0")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    meta = make(tmp_path / "out", tmp_path, tokenizer="char", options=ReadOptions(skip_bad=True), val_share=0.1)
    line = lines[:5000].count(b"\n") + 1
    assert meta["bad"][0] == 3
    assert meta["bad"][1].startswith(f"{tmp_path}/a.jsonl, line {line}: ")
    assert meta["replaced"] == [1, f"{tmp_path}/c.txt, byte 0"]
    assert "bad rows or files left out: 3; the first: " in capsys.readouterr().out
    assert sum(facts["documents"] for facts in meta["splits"].values()) == len(DOCS)  # one is bad, c.txt is new


def test_a_normalizer_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("abAB" * 100)
    make(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert "the tokenizer's normalizer changes some characters: Lowercase" in capsys.readouterr().out


def test_a_tokenizer_has_the_hash_that_it_had_with_the_earlier_spelling():
    """Or a dataset with the tokenizer of a GGUF file would be prepared again."""
    spellings = (EARLIER_GPT2_PATTERN, SAME_WORDS[EARLIER_GPT2_PATTERN])
    made = [Tokenizer(make_byte_level_bpe(BYTE_DECODER, [], [pattern], [])) for pattern in spellings]
    assert made[0]._inner.to_str() != made[1]._inner.to_str()
    assert prepare_module._fingerprint(made[0]) == prepare_module._fingerprint(made[1])


def test_a_split_without_a_row_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "a.txt"
    tenth = TrainConfig.block_size
    for length, warning in ((10 * tenth, f"no row for a block_size of {tenth:,} or more"), (10 * (tenth + 1), None)):
        text.write_text("ab" * (length // 2))
        make(tmp_path / str(length), text, tokenizer="char")
        printed = capsys.readouterr().out
        assert warning in printed if warning else "warning" not in printed
    (tmp_path / "documents.jsonl").write_bytes(json_lines(["a", "b" * 20_000]))
    make(tmp_path / "documents", tmp_path / "documents.jsonl", tokenizer="char")
    assert re.search("warning: (train|val) has only 1 tokens", capsys.readouterr().out)


def test_too_little_disk_space_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("text " * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(InputError, match=r"needs about 0\.0 GB and has 0\.0 GB free"):
        make(tmp_path / "out", tmp_path / "a.txt", tokenizer="char")


def test_two_preparations_of_a_folder_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCS))
    original = prepare_module.check_disk

    def check_disk(*args: Any) -> None:
        with pytest.raises(InputError, match="another process is preparing"):
            make(tmp_path / "out", tmp_path / "a.jsonl")
        original(*args)

    monkeypatch.setattr(prepare_module, "check_disk", check_disk)
    make(tmp_path / "out", tmp_path / "a.jsonl", val_share=0.2)


# --- Resuming


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Copies of the output folder as kills would leave it: around appends, renames and deletions."""
    copies: list[Path] = []

    def copy() -> None:
        if (tmp_path / "out").exists():
            copies.append(tmp_path / "copies" / str(len(copies)))
            shutil.copytree(tmp_path / "out", copies[-1])

    def copying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            copy()
            result = function(*args, **kwargs)
            copy()
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copying(os.replace))
        patch.setattr(Path, "unlink", copying(Path.unlink))
        patch.setattr(write.SplitWriter, "append", copying(write.SplitWriter.append))
        yield copies


def text_inputs(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("\n".join(DOCS[:40]), encoding="utf-8")
    return {"tokenizer": "char", "shard_tokens": 1000}


def mixed_inputs(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("\n".join(DOCS[:60]), encoding="utf-8")
    (folder / "b.jsonl").write_bytes(json_lines(DOCS[:50]) + b'"caf\xe9"\n""\n')
    pack_tar(folder / "c.tar.gz", "gz", {"d.jsonl": json_lines(DOCS[50:80]), "e.md": "\n".join(DOCS[:30]).encode()})
    return {"tokenizer": "bpe:300", "shard_tokens": 1000, "val_share": 0.3}


def chat_inputs(folder: Path) -> dict[str, Any]:
    rows = [json.dumps({"prompt": text, "completion": "Yes." * i}) for i, text in enumerate(DOCS[:60])]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return {"options": ReadOptions(chat=True), "shard_tokens": 2500, "val_share": 0.3, "limit": 55}


@pytest.mark.parametrize("inputs", [text_inputs, mixed_inputs, chat_inputs])
def test_a_kill_at_any_instant_changes_nothing(
    inputs: Callable[[Path], dict[str, Any]], tmp_path: Path, snapshots: list[Path], monkeypatch: pytest.MonkeyPatch
):
    for module in (streams, prepare_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2500)  # for many batches
    monkeypatch.setattr(reading, "PIECE_BYTES", 2000)
    (tmp_path / "in").mkdir()
    settings = inputs(tmp_path / "in")
    make(tmp_path / "out", tmp_path / "in", **settings)
    whole = read_files((tmp_path / "out").rename(tmp_path / "whole"))  # no more snapshots
    instants = list(snapshots)
    assert len(instants) > 40
    assert len(whole) >= 7
    for number, instant in enumerate(instants[:: len(instants) // 12]):
        resumed = tmp_path / f"resumed{number}"
        shutil.copytree(instant, resumed)
        make(resumed, tmp_path / "in", workers=1 + 2 * (number % 2), **settings)
        assert read_files(resumed) == whole, instant


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], dict[str, Any]]:
    """The inputs and settings of a preparation that stopped at its last input, which can be read now."""
    names = [tmp_path / f"{name}.jsonl" for name in "abc"]
    names[0].write_bytes(json_lines(DOCS[:200]))
    names[1].write_bytes(json_lines(DOCS[200:]))
    names[2].write_bytes(b"{")
    for module in (streams, prepare_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1500)
    settings: dict[str, Any] = {"val_share": 0.2, "shard_tokens": 5000}
    with pytest.raises(InputError, match=r"c\.jsonl, line 1"):
        make(tmp_path / "out", *names, **settings)
    names[2].write_bytes(json_lines(["the end"]))  # an input that was not read may change
    return names, settings


def test_finished_shards_are_not_read_again(
    interrupted: tuple[list[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names, settings = interrupted
    starts = []
    original = Job.map

    def spy(self: Job, function: Any, start: Position) -> Any:
        starts.append(start)
        return original(self, function, start)

    monkeypatch.setattr(Job, "map", spy)
    make(tmp_path / "out", *names, **settings)
    make(tmp_path / "whole", *names, **settings)
    assert starts[0].source == 1
    assert starts[0].documents > 200
    assert starts[1] == Position()
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"shard_tokens": 2000}, {"tokenizer": "char"}, None], ids=str)
def test_other_settings_or_inputs_start_over(
    change: dict[str, Any] | None,
    interrupted: tuple[list[Path], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    names, settings = interrupted
    if change:
        settings |= change
    else:
        names[0].write_bytes(json_lines(DOCS[::-1]))
    make(tmp_path / "out", *names, **settings)
    assert "starting over" in capsys.readouterr().out
    make(tmp_path / "whole", *names, **settings)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


class Hub:
    """Stands for the hub: two files of DOCS[:150] and DOCS[150:], which revision is the newest, what was downloaded."""

    def __init__(self, folder: Path) -> None:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        self.folder = folder
        self.revision = "first"
        self.unreachable = ""
        self.downloads: list[str] = []
        self.siblings = []
        (folder / "data").mkdir(parents=True)
        for k in range(2):
            name = f"data/train-{k}.parquet"
            parquet.write_table(pa.table({"text": DOCS[150 * k : 150 * (k + 1)]}), folder / name)
            content = (folder / name).read_bytes()
            lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())
            self.siblings.append(SimpleNamespace(rfilename=name, lfs=lfs, size=len(content)))

    def dataset_info(self, repo: str, **settings: Any) -> SimpleNamespace:
        card = {"configs": [{"config_name": "en", "data_files": [{"split": "train", "path": "data/train-*"}]}]}
        return SimpleNamespace(sha=self.revision, siblings=self.siblings, card_data=card)

    def download(self, repo: str, name: str, repo_type: str, revision: str, local_dir: Path) -> str:
        assert (repo, repo_type, revision) == ("Skylion007/openwebtext", "dataset", "first")
        if name == self.unreachable:
            raise ConnectionError("no network")
        assert {path.name for path in local_dir.glob("data/*")} <= {Path(name).name}
        self.downloads.append(name)
        (local_dir / "data").mkdir(exist_ok=True)
        return str(shutil.copy(self.folder / name, local_dir / name))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def test_files_of_the_hub_stay_at_their_revision(hub: Hub, tmp_path: Path):
    """Downloaded one after the other, deleted when read; a resumed preparation keeps its list of files."""
    name = "hf:Skylion007/openwebtext@en"
    settings: dict[str, Any] = {"val_share": 0.2, "shard_tokens": 1000}
    hub.unreachable = "data/train-1.parquet"
    with pytest.raises(InputError, match=r"train-1\.parquet could not be downloaded .*no network.* to resume"):
        make(tmp_path / "out", name, **settings)
    hub.revision = "second"
    hub.unreachable = ""
    make(tmp_path / "out", name, **settings)
    assert hub.downloads[-1] == "data/train-1.parquet"
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCS))
    make(tmp_path / "whole", tmp_path / "a.jsonl", **settings)
    for shard in ("train-00000.bin", "val-00000.bin"):
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()


@needs_gpt2
@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--under=data/train-1"], ["--input", "hub/data/train-1.parquet"]], ids=str)
def test_openwebtext_holds_gpt2s_ids(flags: list[str], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of files on the hub or on the disk, with a limit, each document ended by GPT-2's end token."""
    monkeypatch.chdir(tmp_path)
    assert run_script("data/openwebtext/prepare.py", "--out=out", "--val-share=0.1", "--docs=120", *flags) == 0
    gpt2 = tiktoken.get_encoding("gpt2")
    data = open_dataset("out", block_size=64, vocab_size=50_257, verify=True)
    for split, tokens in (("train", data.train), ("val", data.val)):
        texts = [text for text in DOCS[150:270] if text in documents_of(split, 0.1)]
        assert gpt2.decode(tokens[:].tolist()) == "".join(f"{text}<|endoftext|>" for text in texts)
        assert data.meta["splits"][split]["documents"] == len(texts)
