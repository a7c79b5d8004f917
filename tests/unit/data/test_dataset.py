"""Datasets on disk: whole or in shards, with loss masks, mixed; damaged ones are refused in a line."""

import json
import mmap
import os
import pickle
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import shard

from nanogpt.data.dataset import open_dataset, resolve
from nanogpt.data.rows import EvalWindows, Rows
from nanogpt.data.write import write_dataset, write_text
from nanogpt.errors import InputError
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 30
VOCAB = len(set(TEXT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "york", TEXT, Tokenizer.characters(TEXT))
    return tmp_path / "york"


def truncate(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


def edit_meta(folder: Path, **changes: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- One dataset


def test_ids_above_65536_take_four_bytes(tmp_path: Path):
    wide = Tokenizer.characters("".join(map(chr, range(0x10000, 0x10000 + 66_000))))
    splits = {"train": [np.arange(40_000), np.arange(40_000, 66_000)], "val": [np.arange(99)]}
    meta = write_dataset(tmp_path, splits, wide)
    assert (meta["dtype"], meta["largest_id"]) == ("uint32", 65_999)
    for _ in range(2):  # the second time without meta.json, as after an interruption
        data = open_dataset(tmp_path, block_size=8)
        assert data.vocab_size == 66_000
        assert np.array_equal(data.train[:], np.arange(66_000))
        (tmp_path / "meta.json").unlink(missing_ok=True)


def test_folders_of_nanogpt_are_accepted(folder: Path):
    (folder / "meta.json").unlink()
    (folder / "tokenizer.json").unlink()
    data = open_dataset(folder, block_size=8)
    assert (data.vocab_size, data.tokenizer) == (None, None)
    assert data.end_of_text == 50256  # GPT-2's, as of nanoGPT's openwebtext
    assert open_dataset(folder, block_size=8, vocab_size=VOCAB).end_of_text is None  # for another model
    with pytest.raises(InputError, match=r"verify_data=True: .*has no meta\.json with hashes"):
        open_dataset(folder, block_size=8, verify=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "stoi": {"b": 0, "a": 1}, "itos": {}}))
    data = open_dataset(folder, block_size=8)
    assert data.vocab_size == 2
    with pytest.raises(InputError, match="vocab_size is 2"):
        Rows(data.train, 8, 2, 0)[0:9]


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "val.bin").unlink(), r"val\.bin is missing: prepare"),
    "empty": (lambda f: truncate(f / "val.bin", 0), r"val\.bin is empty"),
    "odd": (lambda f: truncate(f / "train.bin", -1), r"train\.bin is cut short: \d+ bytes are not whole uint16"),
    "short": (lambda f: truncate(f / "train.bin", -2), r"train\.bin holds 2,105 tokens where meta\.json counts 2,106"),
    "other": (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), "SHA-256 differs"),
    "json": (lambda f: truncate(f / "meta.json", -9), r"meta\.json is damaged"),
    "newer": (lambda f: edit_meta(f, format=2), r"meta\.json is damaged \(.*another version"),
    "dtype": (lambda f: edit_meta(f, dtype="uint32"), r"meta\.json is damaged \(.*contradict each other"),
    "ids": (lambda f: edit_meta(f, largest_id=VOCAB), r"meta\.json is damaged \(.*contradict each other"),
    "words": (lambda f: edit_meta(f, vocab_size="many"), r"meta\.json is damaged \(vocab_size: expected"),
    "no hash": (lambda f: edit_meta(f, splits={"train": {"tokens": 2106}}), r"train\.bin has no sha256"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_dataset_is_refused_in_a_line(folder: Path, name: str):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(folder, block_size=8, verify=True)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_all_problems_are_reported_at_once(folder: Path):
    truncate(folder / "train.bin", -1)
    with pytest.raises(InputError) as caught:
        open_dataset(folder, block_size=10_000, vocab_size=20)
    cut, short, ids = str(caught.value).splitlines()
    assert "train.bin is cut short" in cut
    assert "val split is shorter than one block: 234 tokens" in short
    assert "--block_size=233" in short
    assert f"holds id {VOCAB - 1}, but the model's vocab_size is 20" in ids
    assert len(open_dataset(folder, block_size=233, splits=("val",)).val) == 234


def test_resolve_finds_paths_and_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data/york")
    (tmp_path / "york").mkdir()  # an empty folder of that name does not hide the dataset
    assert resolve("york") == resolve("data/york") == Path("data/york")
    assert open_dataset(tmp_path / "data/york", block_size=8).name == "york"
    with pytest.raises(InputError, match=r"no dataset 'yorck' .*: did you mean york\?"):
        resolve("yorck")
    with pytest.raises(InputError, match=r"one of data/: .*york"):
        resolve("zzzzzzzz")
    (tmp_path / "data/lear").mkdir()
    (tmp_path / "data/lear/prepare.py").touch()
    with pytest.raises(InputError, match=r"'lear' is not prepared yet: run `python data/lear/prepare\.py`"):
        open_dataset("lear", block_size=8)
    (tmp_path / "data/york/preparing").mkdir()
    assert resolve("york") == Path("data/york")  # another dataset is being prepared there
    (tmp_path / "data/york/meta.json").unlink()
    with pytest.raises(InputError, match=r"'york': its preparation is not finished; run the same command again"):
        resolve("york")


# --- Shards and loss masks


@pytest.mark.parametrize("tokens", [1, 37, 2106])
def test_shards_read_like_one_file(folder: Path, tokens: int):
    """Windows of 65 tokens span up to 65 files."""
    whole = open_dataset(folder, block_size=64)
    rows = {order: Rows(whole.train, 64, VOCAB, 5, order)[30:90] for order in ("random", "epoch")}
    windows, val = EvalWindows(whole.val, 64, 0, 1, VOCAB)[0:9], whole.val[:]
    shard(folder, tokens)
    data = open_dataset(folder, block_size=64, vocab_size=50, verify=True)
    for order, expected in rows.items():
        assert all(map(torch.equal, Rows(data.train, 64, VOCAB, 5, order)[30:90], expected))
    assert all(map(torch.equal, EvalWindows(data.val, 64, 0, 1, VOCAB)[0:9], windows))
    assert (len(data.train), len(data.val)) == (2106, 234)
    assert np.array_equal(data.val[:], val)
    assert data.val.bytes_per_token == 1


def test_opening_looks_at_each_shard_twice_and_reads_none(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Once whether it is there, once for its size: a thousand processes may open ten thousand shards at once."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    shard(folder, 30)
    num_shards = len(list(folder.glob("*-*.bin")))
    count(os, "stat")
    for name in ("listdir", "scandir", "open"):
        count(os, name)
    count(mmap, "mmap")
    data = open_dataset(folder, block_size=8)
    assert num_shards > 70
    assert 2 * num_shards <= calls.pop("stat") <= 2 * num_shards + 30
    assert not calls
    data.train[100:109]  # of a single shard
    assert calls["mmap"] == 1


SHARDS_BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other": (lambda f: (f / "val-00001.bin").write_bytes(bytes(74)), r"val-00001\.bin is not the file .* SHA-256"),
    "mask": (lambda f: (f / "val-00001.mask").write_bytes(bytes(37)), r"val-00001\.mask is not the file .* SHA-256"),
    "no mask": (lambda f: (f / "val-00001.mask").unlink(), r"val-00001\.mask is missing"),
    "cut mask": (lambda f: truncate(f / "val-00001.mask", 5), r"val-00001\.mask holds 5 tokens where .* counts 37"),
    "no meta": (lambda f: (f / "meta.json").unlink(), r"train\.bin is missing: prepare"),
}


@pytest.mark.parametrize("name", SHARDS_BROKEN)
def test_a_broken_shard_is_refused(folder: Path, name: str):
    shard(folder, 37, {"train": np.ones(2106), "val": np.ones(234)})
    damage, message = SHARDS_BROKEN[name]
    damage(folder)
    with pytest.raises(InputError, match=message):
        open_dataset(folder, block_size=8, verify=True)


@pytest.mark.parametrize("file", ["../york/train.bin", "/train.bin", 5, None])
def test_shards_are_files_of_their_own_folder(folder: Path, file: object):
    shards = [{"file": file, "tokens": 2106, "sha256": ""}]
    edit_meta(folder, splits={"train": {"tokens": 2106, "shards": shards}})
    with pytest.raises(InputError, match=r"meta\.json is damaged \(.*(is not a file of its folder|file: expected)"):
        open_dataset(folder, block_size=8)
    edit_meta(folder, splits={"train": {"tokens": 2105, "shards": [shards[0] | {"file": "train.bin"}]}})
    with pytest.raises(InputError, match=r"shards of train do not hold 2,105 tokens"):
        open_dataset(folder, block_size=8)


def test_a_bad_id_in_a_shard_is_found_in_its_file(folder: Path):
    shard(folder, 500)
    ids = np.fromfile(folder / "train-00003.bin", np.uint16)
    ids[123] = 999
    ids.tofile(folder / "train-00003.bin")
    rows = Rows(open_dataset(folder, block_size=64).train, 64, 50, 0, "epoch")
    with pytest.raises(InputError, match=r"train-00003\.bin holds id 999 at token 123, but"):
        rows[0:32]
    rows = Rows(open_dataset(folder, block_size=64).train, 64, 50, 0, "epoch")
    (folder / "train-00000.bin").unlink()
    with pytest.raises(InputError, match=r"train-00000\.bin cannot be read any more \(.*put it back"):
        rows[0:32]


def test_a_shard_that_is_replaced_before_its_first_use_is_refused(folder: Path):
    shard(folder, 500)
    tokens = open_dataset(folder, block_size=64).train
    path = folder / "train-00001.bin"
    expected = tokens[0:500].copy()
    os.utime(path, ns=(1, 1))  # as other tokens of the same number would have
    assert np.array_equal(tokens[0:500], expected)
    with pytest.raises(InputError, match=r"train-00001\.bin cannot be read any more \(it has changed"):
        tokens[500:501]


def test_masked_tokens_are_no_targets(folder: Path):
    mask = {split: np.random.default_rng(1).random(n) < 0.3 for split, n in (("train", 2106), ("val", 234))}
    x, y = Rows(open_dataset(folder, block_size=16).train, 16, 50, 3)[0:40]
    shard(folder, 37, mask)
    data = open_dataset(folder, block_size=16, verify=True)
    rows = Rows(data.train, 16, 50, 3)
    inputs, targets = rows[0:40]
    is_target = np.stack([mask["train"][start + 1 : start + 17] for start in rows.starts(slice(0, 40))])
    assert torch.equal(inputs, x)
    assert torch.equal(targets, torch.where(torch.from_numpy(is_target), y, -1))
    assert rows.num_targets(slice(3, 40)) == is_target[3:].sum()
    windows = EvalWindows(data.val, 16, 0, 1, 50)[0:99][1]
    assert torch.equal(windows.flatten() >= 0, torch.from_numpy(mask["val"][1:225]))
    assert data.val.bits_per_byte(1.0) is None  # of a part of the text


def test_many_shards_need_few_file_descriptors(tmp_path: Path):
    """A map keeps one; here are 300 files of tokens and as many of masks."""
    letters = Tokenizer.characters("".join(map(chr, range(50, 100))))
    write_dataset(tmp_path, {"train": [np.arange(6_000) % 50], "val": [np.arange(20)]}, letters)
    shard(tmp_path, 20, {"train": np.ones(6_000), "val": np.ones(20)})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        x, y = Rows(open_dataset(tmp_path, block_size=16).train, 16, 50, 0)[0:3000]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ((x + 1) % 50 == y).all()


# --- Mixtures


def test_a_mixture_is_opened_by_names_and_shares(folder: Path, tmp_path: Path):
    write_text(tmp_path / "a:0.5", TEXT * 3, Tokenizer.characters(TEXT))  # a path may hold a colon
    name = f"{folder}:0.2, {tmp_path}/a:0.5:0.6"
    data = open_dataset(name, block_size=8, vocab_size=50, verify=True)
    assert data.name == name
    assert data.tokenizer is not None
    assert [(part.tokens, part.weight) for part in data.train.parts] == [(2106, 250_000), (6318, 750_000)]
    assert len(data.train) == 4 * 2106
    assert data.val.bytes_per_token == 1
    assert len(open_dataset(tmp_path / "a:0.5", block_size=8).train) == 6318


def test_a_mixture_has_an_end_of_text_if_its_parts_have_the_same(tmp_path: Path):
    for name in ("a", "b", "c"):
        write_text(tmp_path / name, TEXT, Tokenizer.bytes())
    edit_meta(tmp_path / "c", end_of_text=10)
    ends = [open_dataset(f"{tmp_path}/a:1,{tmp_path}/{name}:1", block_size=8).end_of_text for name in ("b", "c")]
    assert ends == [256, None]


def test_a_mixture_takes_nanogpt_s_folder_for_gpt2_s_encoding(tmp_path: Path):
    """It has no meta.json: its ids are GPT-2's by convention, as those of the other are by its meta.json."""
    (tmp_path / "openwebtext").mkdir()
    for split in ("train", "val"):
        np.arange(99, dtype="<u2").tofile(tmp_path / f"openwebtext/{split}.bin")
    write_text(tmp_path / "mine", TEXT, Tokenizer.bytes())
    edit_meta(tmp_path / "mine", vocab_size=GPT2_VOCAB)
    (tmp_path / "mine/tokenizer.json").unlink()
    mixture = f"{tmp_path}/{{}}:0.5,{tmp_path}/{{}}:0.5"
    assert len(open_dataset(mixture.format("openwebtext", "mine"), block_size=8).train.parts) == 2
    assert len(open_dataset(mixture.format("mine", "openwebtext"), block_size=8).train.parts) == 2


def test_a_file_of_both_splits_that_is_cut_is_an_error(tmp_path: Path):
    path = tmp_path / "tokens.bin"
    np.arange(9999, dtype="<u2").tofile(path)
    train = open_dataset(path, block_size=8).train
    assert train[0:3].tolist() == [0, 1, 2]
    truncate(path, 4096)
    with pytest.raises(InputError, match=r"tokens\.bin or its mask was cut short"):
        train[0:3]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("york:0.5,other:0.5", "york and other have different tokenizers; prepare them with the same"),
        ("york:0.5,other", "'other' is not a valid mixture entry"),
        ("york:0.5,york:0.5", "not a valid mixture entry"),
        ("york:0", "not a valid mixture entry"),
        ("york:1e308,other:1e308", "not a valid mixture entry"),
        ("york:0.5,nowhere:1,york/no:1", r"^there is no dataset 'nowhere'.*\nthere is no dataset 'york/no'"),
        ("york.txt:1,york:1", r"there is no dataset 'york\.txt' .*`python data/prepare\.py york\.txt --out="),
    ],
)
def test_a_wrong_mixture_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, mixture: str, message: str):
    monkeypatch.chdir(folder.parent)
    write_text("other", "0123456789" * 99, Tokenizer.characters("0123456789"))
    Path("york.txt").touch()
    with pytest.raises(InputError, match=message):
        open_dataset(mixture, block_size=8)


@pytest.mark.parametrize("dataset", ["", ".", "/"])
def test_a_folder_without_a_name_is_no_dataset(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^(there is no dataset '|dataset '.* is not prepared)"):
        open_dataset(dataset, block_size=8)
