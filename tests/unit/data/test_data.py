"""Datasets on disk and the rows read from them."""

import contextlib
import hashlib
import http.server
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment, shard

from nanogpt.data.dataset import Tokens, open_dataset, resolve
from nanogpt.data.rows import EvalWindows, Rows, _part_counts
from nanogpt.data.write import download, format_summary, read_text, write_dataset, write_text
from nanogpt.errors import InputError
from nanogpt.hashing import derive_seed, permute
from nanogpt.text.tokenizer import Tokenizer

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 30
CUT = len(TEXT) * 9 // 10
COUNT = np.arange(1000, dtype=np.uint16)  # each token is its own position


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "york", TEXT, Tokenizer.characters(TEXT))
    return tmp_path / "york"


# ---- rows


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_rows_depend_on_seed_and_index_alone(order: str):
    rows = Rows(COUNT, 7, 1000, seed=1337, order=order)
    x, y = rows[0:1000]
    assert x.shape == y.shape == (1000, 7)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y)
    assert x.is_contiguous()
    assert y.is_contiguous()
    again = Rows(COUNT.copy(), 7, 1000, 1337, order)
    for cuts in ([0, 1000], [0, 1, 3, 141, 142, 143, 500, 1000], [*range(0, 1000, 37), 1000]):
        parts = [again[a:b] for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([p[0] for p in parts]), x)
        assert torch.equal(torch.cat([p[1] for p in parts]), y)
    assert not torch.equal(Rows(COUNT, 7, 1000, 1338, order)[0:1000][0], x)
    assert rows[5:5][0].shape == (0, 7)
    assert rows[2**40 : 2**40 + 2][0].shape == (2, 7)


@pytest.mark.parametrize(("tokens", "block"), [(2, 1), (9, 8), (17, 8), (25, 8), (1000, 7), (1000, 1)])
def test_an_epoch_visits_each_window_once(tokens: int, block: int):
    rows = Rows(COUNT[:tokens], block, 1000, seed=3, order="epoch")
    n = (tokens - 1) // block
    epochs = rows[0 : 3 * n][0][:, 0].view(3, n)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(0, n * block, block))
    if n > 20:
        assert not torch.equal(epochs[0], epochs[1])
        assert abs(np.corrcoef(epochs[0], np.arange(n))[0, 1]) < 4 / n**0.5


def test_permutations_are_evenly_drawn():
    keys = np.arange(24_000, dtype=np.uint64)
    drawn = np.stack([permute(np.full(len(keys), i, np.uint64), keys, 5) for i in range(5)], axis=1)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 120
    assert ((counts - 200) ** 2 / 200).sum() < 173.6  # chi-squared with 119 degrees of freedom, p = 0.001


def test_random_starts_are_uniform_and_reach_both_ends():
    rows = Rows(COUNT, 990, 1000, seed=0)
    starts = rows[0:5_000][0][:, 0]
    counts = torch.bincount(starts)
    assert len(counts) == 10  # 0 to len - block_size - 1
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.06


def test_mix():
    seeds = {derive_seed(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(-2, 8)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0) != derive_seed(0, 0)
    # SplitMix64's own first outputs for seed 0 (Vigna, prng.di.unimi.it/splitmix64.c)
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert derive_seed(2**64 - 1) == derive_seed(-1)


def test_a_bad_id_is_named_before_it_reaches_the_device(tmp_path: Path):
    COUNT.tofile(tmp_path / "train.bin")
    tokens = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    rows = Rows(tokens, 10, 1000, seed=0)
    assert rows[0:500][0].max() <= 999
    with pytest.raises(InputError, match=r"train\.bin holds id 9\d\d at token 9\d\d, .*vocab_size is 900"):
        Rows(tokens, 10, 900, seed=0)[0:500]
    with pytest.raises(InputError, match="holds id 900 at token 900"):
        EvalWindows(tokens, 10, 0, 1, 900)[0:99]


@pytest.mark.parametrize(("batches", "expected"), [(0, 142), (1, 4), (10, 40), (36, 142), (1000, 142)])
def test_eval_windows_cover_the_split_at_most_once(batches: int, expected: int):
    windows = EvalWindows(COUNT, 7, batches, 4, 1000)
    assert len(windows) == expected
    x, y = windows[0:expected]
    assert torch.equal(x + 1, y)
    starts = x[:, 0]
    assert (starts % 7 == 0).all()
    gaps = starts.diff()
    assert gaps.min() >= 7
    assert gaps.max() - gaps.min() <= 7
    assert len(x.unique()) == 7 * expected
    assert torch.equal(torch.cat([windows[i : i + 5][0] for i in range(0, expected, 5)]), x)
    if not batches:
        assert torch.equal(y.flatten(), torch.arange(1, 995))  # the tail shorter than a window is left out


# ---- datasets


def test_written_and_opened_again(folder: Path):
    assert sorted(os.listdir(folder)) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    data = open_dataset(folder, block_size=64, vocab_size=50, verify=True)
    assert data.name == "york"
    assert data.tokenizer is not None
    train, val = TEXT[:CUT], TEXT[CUT:]
    assert data.tokenizer.decode(data.train[:].tolist()) == train
    assert data.tokenizer.decode(data.val[:].tolist()) == val
    assert data.vocab_size == len(set(TEXT)) == data.meta["largest_id"] + 1
    assert data.train[:].dtype == np.dtype("<u2")
    assert data.meta["splits"]["val"]["bytes"] == len(val.encode())
    assert f"train: {len(train):,} tokens" in format_summary(data.meta)
    assert Rows(data.train, 64, data.vocab_size, 0)[0:2][0].shape == (2, 64)


def test_wide_ids_take_four_bytes(tmp_path: Path):
    wide = Tokenizer.characters("".join(map(chr, range(0x10000, 0x10000 + 66_000))))
    parts = {"train": [np.arange(40_000), np.arange(40_000, 66_000)], "val": [np.arange(99)]}
    meta = write_dataset(tmp_path, parts, wide)
    assert (meta["dtype"], meta["largest_id"]) == ("uint32", 65_999)
    for _ in range(2):  # the second time without meta.json, as after an interruption
        data = open_dataset(tmp_path, block_size=8)
        assert data.vocab_size == 66_000
        assert np.array_equal(data.train[:], np.arange(66_000))
        (tmp_path / "meta.json").unlink(missing_ok=True)


def test_nanogpt_folders_are_accepted(folder: Path):
    (folder / "meta.json").unlink()
    (folder / "tokenizer.json").unlink()
    data = open_dataset(folder, block_size=8)
    assert (data.vocab_size, data.tokenizer) == (None, None)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "stoi": {"b": 0, "a": 1}, "itos": {}}))
    data = open_dataset(folder, block_size=8)
    assert data.vocab_size == 2
    with pytest.raises(InputError, match="vocab_size is 2"):
        Rows(data.train, 8, 2, 0)[0:9]


def _cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "missing": (lambda f: (f / "val.bin").unlink(), r"val\.bin is missing: prepare"),
    "empty": (lambda f: _cut(f / "val.bin", 0), r"val\.bin is empty"),
    "odd": (lambda f: _cut(f / "train.bin", -1), r"train\.bin is cut short: \d+ bytes are not whole uint16"),
    "short": (lambda f: _cut(f / "train.bin", -2), r"train\.bin holds 2,105 tokens where meta\.json counts 2,106"),
    "other": (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), "SHA-256 differs"),
    "json": (lambda f: _cut(f / "meta.json", -9), r"meta\.json is damaged \(JSONDecodeError"),
    "list": (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json is damaged"),
    "newer": (lambda f: _edit(f / "meta.json", format=2), r"meta\.json is damaged \(.*another version"),
    "dtype": (lambda f: _edit(f / "meta.json", dtype="uint32"), r"meta\.json is damaged \(.*do not fit"),
    "words": (lambda f: _edit(f / "meta.json", vocab_size="many"), r"meta\.json is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_dataset_gives_a_line_that_says_so(folder: Path, name: str):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(folder, block_size=8, verify=True)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_all_faults_are_reported_at_once(folder: Path):
    _cut(folder / "train.bin", -1)
    with pytest.raises(InputError) as caught:
        open_dataset(folder, block_size=10_000, vocab_size=20)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "train.bin is cut short" in lines[0]
    assert (
        "val.bin is shorter than one block: 234 tokens, block_size 10000 needs 10,001; set --block_size=233" in lines[1]
    )
    assert f"holds id {len(set(TEXT)) - 1}, but the model's vocab_size is 20" in lines[2]
    assert len(open_dataset(folder, block_size=233, splits=("val",)).val) == 234


def test_a_broken_write_keeps_the_old_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = Tokenizer.characters("0123456789")

    def breaks():
        yield np.arange(5)
        raise OSError("disk full")

    with pytest.raises(InputError, match=r"york could not be written \(disk full\): make room .* --out"):
        write_dataset(folder, {"train": [np.arange(9)], "val": breaks()}, other)
    with pytest.raises(InputError, match=r"the val split of .* would be empty"):
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


@pytest.mark.parametrize("moment", range(11))
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


def test_resolve(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data/york")
    assert resolve("york") == Path("data/york")
    assert resolve("data/york") == Path("data/york")
    assert open_dataset(tmp_path / "data/york", block_size=8).name == "york"
    (tmp_path / "york").mkdir()  # an empty folder of that name does not hide the dataset
    assert resolve("york") == Path("data/york")
    with pytest.raises(InputError, match=r"no dataset 'yorck' .*: did you mean york\?"):
        resolve("yorck")
    with pytest.raises(InputError, match=r"give a folder's path, or of data/ .*york"):
        resolve("zzzzzzzz")
    (tmp_path / "data/lear").mkdir()
    (tmp_path / "data/lear/prepare.py").touch()
    with pytest.raises(InputError, match=r"'lear' is not prepared yet: run `python data/lear/prepare\.py`"):
        open_dataset("lear", block_size=8)


# ---- shards, loss masks, mixtures


@pytest.mark.parametrize("tokens", [1, 10, 37, 2106])
def test_shards_are_one_file(folder: Path, tokens: int):
    """Windows of 65 tokens lie in up to 65 files."""
    whole, size = open_dataset(folder, block_size=64), len(set(TEXT))
    rows = [Rows(whole.train, 64, size, 5, order)[30:90] for order in ("random", "epoch")]
    windows, val = EvalWindows(whole.val, 64, 0, 1, size)[0:9], whole.val[:]
    shard(folder, tokens)
    data = open_dataset(folder, block_size=64, vocab_size=50, verify=True)
    for order, expected in zip(("random", "epoch"), rows, strict=True):
        assert all(map(torch.equal, Rows(data.train, 64, size, 5, order)[30:90], expected))
    assert all(map(torch.equal, EvalWindows(data.val, 64, 0, 1, size)[0:9], windows))
    assert (len(data.train), len(data.val)) == (2106, 234)
    assert np.array_equal(data.val[:], val)
    assert data.val.bytes_per_token == 1
    assert data.val.bits_per_byte(np.log(2)) == pytest.approx(1)


SHARDS_BROKEN = {
    "missing": (lambda f: (f / "train-00007.bin").unlink(), r"train-00007\.bin is missing: prepare"),
    "short": (lambda f: _cut(f / "train-00007.bin", -2), r"train-00007\.bin holds 36 tokens where .* counts 37"),
    "other": (lambda f: (f / "val-00001.bin").write_bytes(bytes(74)), r"val-00001\.bin is not the file .* SHA-256"),
    "mask": (lambda f: (f / "val-00001.mask").write_bytes(bytes(37)), r"val-00001\.mask is not the file .* SHA-256"),
    "no mask": (lambda f: (f / "val-00001.mask").unlink(), r"val-00001\.mask is missing"),
    "cut mask": (lambda f: _cut(f / "val-00001.mask", 5), r"val-00001\.mask holds 5 tokens where meta\.json counts 37"),
    "no meta": (lambda f: (f / "meta.json").unlink(), r"train\.bin is missing: prepare"),
}


@pytest.mark.parametrize("name", SHARDS_BROKEN)
def test_a_broken_shard_gives_a_line_that_says_so(folder: Path, name: str):
    shard(folder, 37, {"train": np.ones(2106), "val": np.ones(234)})
    damage, message = SHARDS_BROKEN[name]
    damage(folder)
    with pytest.raises(InputError, match=message):
        open_dataset(folder, block_size=8, splits=("val", "train") if "val" in message else ("train",), verify=True)


@pytest.mark.parametrize("file", ["../york/train.bin", "/train.bin", 5])
def test_shards_lie_in_their_own_folder(folder: Path, file: object):
    shards = [{"file": file, "tokens": 2106, "sha256": ""}]
    _edit(folder / "meta.json", splits={"train": {"tokens": 2106, "shards": shards}})
    with pytest.raises(InputError, match=r"meta\.json is damaged \(.*do not fit"):
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


def test_masked_targets_are_no_targets(folder: Path):
    mask = {split: np.random.default_rng(1).random(n) < 0.3 for split, n in (("train", 2106), ("val", 234))}
    plain = open_dataset(folder, block_size=16)
    x, y = Rows(plain.train, 16, 50, 3)[0:40]
    shard(folder, 37, mask)
    data = open_dataset(folder, block_size=16, verify=True)
    rows = Rows(data.train, 16, 50, 3)
    inputs, targets = rows[0:40]
    counts = np.stack([mask["train"][start + 1 : start + 17] for start in rows.starts(slice(0, 40))])
    assert torch.equal(inputs, x)
    assert torch.equal(targets, torch.where(torch.from_numpy(counts), y, -1))
    assert rows.num_targets(slice(3, 40)) == counts[3:].sum() == (targets[3:] >= 0).sum()
    windows = EvalWindows(data.val, 16, 0, 1, 50)[0:99][1]
    assert torch.equal(windows.flatten() >= 0, torch.from_numpy(mask["val"][1:225]))
    assert data.val.bits_per_byte(1.0) is None  # of a part of the text


def test_a_thousand_shards_need_few_descriptors(tmp_path: Path):
    """A map keeps one; in a process of its own, which may have 256."""
    letters = Tokenizer.characters("".join(map(chr, range(50, 100))))
    write_dataset(tmp_path, {"train": [np.arange(20_000) % 50], "val": [np.arange(20)]}, letters)
    shard(tmp_path, 20, {"train": np.ones(20_000), "val": np.ones(20)})
    read = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
        "from nanogpt.data import *; data = open_dataset(sys.argv[1], block_size=16); "
        "x, y = Rows(data.train, 16, 50, 0)[0:9000]; assert ((x + 1) % 50 == y).all()"
    )
    subprocess.run([sys.executable, "-c", read, tmp_path], check=True, env=environment())


def of_lengths(*lengths: int) -> list[Tokens]:
    """Splits of ids that tell them apart: the first from 0 on, the second from 10,000 on, and so on."""
    return [Tokens.of(np.arange(n, dtype=np.uint16) + 10_000 * k) for k, n in enumerate(lengths)]


@pytest.mark.parametrize("weights", [[7, 3], [1, 1, 1], [500_000, 300_000, 199_999, 1], [1, 10**6], [5]])
def test_shares_are_exact_to_a_row(weights: list[int]):
    counts = _part_counts(np.arange(20_000), weights)
    assert (counts.sum(0) == np.arange(20_000)).all()
    assert set(np.unique(np.diff(counts))) <= {0, 1}  # each row comes from one source
    shares = np.arange(20_000) * np.array(weights)[:, None] / sum(weights)
    assert np.abs(counts - shares).max() <= len(weights) - 1
    assert (_part_counts(np.array([2**42]), weights) >= 0).all()


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_rows_of_a_mixture_depend_on_seed_and_index_alone(order: str):
    parts = of_lengths(1001, 301, 501)
    rows = Rows(Tokens.mixed(parts, [5, 3, 2]), 10, 60_000, 7, order)
    x, y = rows[0:2000]
    assert torch.equal(x + 1, y)
    assert not (x // 10_000 - x[:, :1] // 10_000).any()  # no window reaches into another source
    for cuts in ([0, 1, 2, 3, 500, 2000], [*range(0, 2000, 37), 2000]):
        assert torch.equal(torch.cat([rows[a:b][0] for a, b in itertools.pairwise(cuts)]), x)
    source = x[:, 0] // 10_000
    assert source.bincount().tolist() == [1000, 600, 400]
    assert not torch.equal(Rows(Tokens.mixed(parts, [5, 3, 2]), 10, 60_000, 8, order)[0:2000][0], x)
    assert torch.equal(
        Rows(Tokens.mixed(parts[:1], [1]), 10, 60_000, 7, order)[0:99][0], Rows(parts[0], 10, 60_000, 7, order)[0:99][0]
    )
    if order == "epoch":
        for k, windows in enumerate((100, 30, 50)):
            epochs = x[source == k][:, 0] - 10_000 * k
            for epoch in epochs[: len(epochs) // windows * windows].view(-1, windows):
                assert sorted(epoch.tolist()) == [*range(0, windows * 10, 10)]


def test_a_mixture_is_evaluated_in_its_shares():
    mixture = Tokens.mixed(of_lengths(1001, 301), [7, 3])
    for batches, expected in ((5, [14, 6]), (0, [70, 30]), (99, [70, 30])):  # the second has no more than 30
        windows = EvalWindows(mixture, 10, batches, 4, 60_000)
        starts = windows[0 : len(windows)][0][:, 0]
        assert (starts // 10_000).bincount().tolist() == expected
        assert len(starts.unique()) == sum(expected)
    assert (starts[starts < 10_000].max(), starts.max() - 10_000) == (980, 290)


def test_a_mixture_by_name(folder: Path, tmp_path: Path):
    write_text(tmp_path / "a:0.5", TEXT * 3, Tokenizer.characters(TEXT))  # a path may hold a colon
    other = tmp_path / "other"
    write_text(other, "0123456789" * 99, Tokenizer.characters("0123456789"))
    data = open_dataset(f"{folder}:0.2, {tmp_path}/a:0.5:0.6", block_size=8, vocab_size=50, verify=True)
    assert data.name == f"{folder}:0.2, {tmp_path}/a:0.5:0.6"
    assert data.tokenizer is not None
    assert [(s.tokens, s.weight) for s in data.train.sources] == [(2106, 250_000), (6318, 750_000)]
    assert len(data.train) == 4 * 2106
    assert data.val.bytes_per_token == 1
    assert len(open_dataset(tmp_path / "a:0.5", block_size=8).train) == 6318
    for wrong, message in {
        f"{folder}:0.5,{other}:0.5": r"york and .*other have different tokenizers; prepare them with the same",
        f"{folder}:0.5,{other}": r"other' is no source of a mixture; write each once with its share, as in",
        f"{folder}:0.5,{folder}:0.5": "no source of a mixture",
        f"{folder}:0": "no source of a mixture",
        f"{folder}:0.5,nowhere:1,{folder}/no:1": r"^there is no dataset 'nowhere'.*\nthere is no dataset '.*york/no'",
    }.items():
        with pytest.raises(InputError, match=message):
            open_dataset(wrong, block_size=8)


# ---- text and downloads


def test_read_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\nb\rc\n".encode())
    assert read_text(path) == "é\nb\nc\n"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        read_text(path)
    with pytest.raises(InputError, match=r"No such file.*--input=FILE"):
        read_text(tmp_path / "b.txt")


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
