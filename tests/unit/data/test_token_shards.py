"""Token files of other programs are read in place, or refused in a line that names the format."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import Rows
from nanogpt.data.write import write_text
from nanogpt.errors import InputError
from nanogpt.text.tokenizer import Tokenizer

END = 50256
RANDOM = np.random.default_rng(0)
DOCUMENTS = [np.append(RANDOM.integers(0, END, length), END) for length in RANDOM.integers(1, 40, 50)]
IDS = np.concatenate(DOCUMENTS)
LENGTHS = np.array([len(document) for document in DOCUMENTS])


def write_numpy(path: Path, dtype: str) -> None:
    with path.open("wb") as file:  # np.save would add a suffix
        np.save(file, IDS.astype(dtype))


def write_llm_c(path: Path, dtype: str) -> None:
    header = {"<u2": (20240520, 1), "<u4": (20240801, 7)}[dtype]
    path.write_bytes(struct.pack("<iii1012x", *header, len(IDS)) + IDS.astype(dtype).tobytes())


def write_megatron(path: Path, dtype: str) -> None:
    """Two sequences a document, as with --split-sentences; then the modes of a multimodal dataset."""
    parts = np.stack([LENGTHS // 2, LENGTHS - LENGTHS // 2], axis=1).ravel()
    places = (np.cumsum(parts) - parts) * np.dtype(dtype).itemsize
    borders = np.arange(0, len(parts) + 1, 2)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, {"<u2": 8, "<i4": 4}[dtype], len(parts), len(borders))
    tables = (parts.astype("<i4"), places.astype("<i8"), borders.astype("<i8"), np.zeros(len(parts), "i1"))
    path.with_suffix(".idx").write_bytes(header + b"".join(table.tobytes() for table in tables))
    IDS.astype(dtype).tofile(path)


def write_datatrove(path: Path, dtype: str) -> None:
    IDS.astype(dtype).tofile(path)
    np.cumsum(LENGTHS).astype("<u8").tofile(f"{path}.index")
    (IDS % 3 > 0).astype("u1").tofile(f"{path}.loss")


def write_litdata(path: Path, dtype: str) -> None:
    places = 4 * (len(LENGTHS) + 2) + np.append(0, np.cumsum(LENGTHS)) * np.dtype(dtype).itemsize
    header = np.append(len(LENGTHS), places).astype("<u4").tobytes()
    path.write_bytes(header + IDS.astype(dtype).tobytes())
    config = {"data_format": [f"no_header_tensor:{ {'<u2': 20, '<i4': 16}[dtype] }"], "compression": None}
    chunk = {"filename": path.name, "chunk_size": len(LENGTHS), "dim": len(IDS)}
    path.with_name("index.json").write_text(json.dumps({"config": config, "chunks": [chunk]}))


FORMATS: dict[str, tuple[Callable[[Path, str], None], str, str]] = {
    "build-nanogpt": (write_numpy, "edufineweb_{}_000001.npy", "<u2"),
    "a renamed array": (write_numpy, "{}.bin", "<i8"),
    "big-endian": (write_numpy, "{}_0.npy", ">u4"),
    "llm.c": (write_llm_c, "TinyStories_{}.bin", "<u2"),
    "llm.c, Llama 3": (write_llm_c, "fineweb_{}_000001.bin", "<u4"),
    "modded-nanogpt, renamed": (write_llm_c, "{}.bin", "<u2"),
    "Megatron": (write_megatron, "my-gpt2_{}_text_document.bin", "<u2"),
    "Megatron, int32": (write_megatron, "{}_text_document.bin", "<i4"),
    "datatrove": (write_datatrove, "{}/00000_00000_shuffled.ds", "<u2"),
    "datatrove, wide": (write_datatrove, "{}/00000_00000_shuffled.ds", "<u4"),
    "litdata": (write_litdata, "{}/chunk-0-0.bin", "<i4"),
    "litdata, narrow": (write_litdata, "{}/chunk-0-0.bin", "<u2"),
}
HAS_BORDERS = ("Megatron", "datatrove", "litdata")


def write(folder: Path, name: str) -> Path:
    """Both splits in a format; the train split's file."""
    write_file, pattern, dtype = FORMATS[name]
    for split in ("val", "train"):
        path = folder / pattern.format(split)
        path.parent.mkdir(exist_ok=True)
        write_file(path, dtype)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_in_place(tmp_path: Path, name: str):
    path = write(tmp_path, name)
    data = open_dataset(tmp_path, block_size=8)
    for tokens in (data.train, data.val):
        assert np.array_equal(tokens[:], IDS)
        assert tokens[:].dtype == FORMATS[name][2]
    x, y = Rows(data.train, 16, END + 1, 0)[0:99]
    assert ((x[:, 1:] == y[:, :-1]) | (y[:, :-1] == -1)).all()
    assert data.end_of_text == END
    assert data.separators == ({END} if name.startswith(HAS_BORDERS) else set())
    if name.startswith("datatrove"):
        assert np.array_equal(data.train.mask(0, len(IDS)), IDS % 3 > 0)
        (tmp_path / "train/00001_00000_shuffled.ds").touch()  # of a worker without documents
        Path(f"{tmp_path}/train/00001_00000_shuffled.ds.index").touch()
        assert len(open_dataset(tmp_path, block_size=8).train.shards) == 1

    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 8)
    with pytest.raises(InputError, match=f"{path.name} or its mask was cut short while it was read"):
        data.train[0:1]
    with pytest.raises(InputError, match=rf"{path.name} holds [\d,]+ tokens where .* counts {len(IDS):,}"):
        open_dataset(tmp_path, block_size=8)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_headers_are_refused(tmp_path: Path, name: str):
    """Random bytes in the headers and index files: read, or an InputError."""
    path = write(tmp_path, name)
    files = [
        file for file in sorted(path.parent.iterdir()) if file.stem.startswith(path.stem) and file.suffix != ".loss"
    ]
    random = np.random.default_rng(1)
    for _ in range(60):
        file = files[random.integers(len(files))]
        good = file.read_bytes()
        bad = bytearray(good)
        for place in random.integers(0, min(len(good), 48), 2):
            bad[place] = random.choice([0, 1, 127, 255])
        file.write_bytes(bad[: random.choice([len(bad), random.integers(len(bad))])])
        with contextlib.suppress(InputError):
            open_dataset(tmp_path, block_size=8)
        file.write_bytes(good)
    assert len(open_dataset(tmp_path, block_size=8).train) == len(IDS)


def test_documents_show_their_separator(tmp_path: Path):
    """By the borders: an id at the end or at the start of each document and nowhere else."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    random = np.random.default_rng(2)

    def separators(make: Callable[[np.ndarray], Any], count: int = 20) -> set[int | None]:
        documents = [np.asarray(make(random.integers(10, 99, 30))) for _ in range(count)]
        for split in ("train", "val"):
            np.concatenate(documents).astype("<u2").tofile(folder / f"{split}.ds")
            np.cumsum([len(document) for document in documents]).astype("<u8").tofile(folder / f"{split}.ds.index")
        data = open_dataset(folder, block_size=8)
        assert data.end_of_text == (END if not data.separators else next(iter(data.separators)))
        return data.separators

    assert separators(lambda text: [*text, 7]) == {7}
    assert separators(lambda text: [7, *text]) == {7}
    assert separators(lambda text: [5, *text, 7]) == {7}
    assert separators(lambda text: [*text, 7, *text, 7]) == {None}  # such as a line break
    assert separators(lambda text: text) == {None}
    assert separators(lambda text: [*text, 7], count=5) == set()  # perhaps by chance


RAW = IDS[:600].astype("<u2")


def test_raw_ids_of_another_type_are_noticed(tmp_path: Path):
    for dtype in ("uint16", "uint32", "int32", "int64"):
        for split in ("train", "val"):
            (RAW.astype(dtype)).tofile(tmp_path / f"{split}.bin")
        data = open_dataset(tmp_path, block_size=8, token_dtype=dtype)
        assert np.array_equal(data.val[:], RAW)
        assert data.val[:].dtype == dtype
        if dtype != "uint16":
            seen = "uint32" if dtype == "int32" else dtype
            with pytest.raises(InputError, match=rf"train\.bin cannot be read: .*look like {seen}; give --token_dtype"):
                open_dataset(tmp_path, block_size=8)
    np.array([-1, *range(8)], "<i4").tofile(tmp_path / "train.bin")  # −1 stands for "no target" elsewhere
    rows = Rows(open_dataset(tmp_path, block_size=8, token_dtype="int32", splits=["train"]).train, 8, END + 1, 0)
    with pytest.raises(InputError, match=r"holds id -1 at token 0,.*tokenizer\.json of its ids .*--token_dtype"):
        rows[0:9]


def test_ids_of_few_letters_are_not_taken_for_wider_ones(tmp_path: Path):
    for vocab in (4, 16, 25, 65):
        for split in ("train", "val"):
            np.random.default_rng(3).integers(0, vocab, 5000).astype("<u2").tofile(tmp_path / f"{split}.bin")
        assert len(open_dataset(tmp_path, block_size=8).train) == 5000


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "questions": ("hellaswag_val.bin", struct.pack("<iii1012x", 20240522, 1, 9), "llm.c's multiple-choice questions"),
    "version": ("train.bin", struct.pack("<iii1012x", 20240520, 2, 9) + bytes(18), "version 2 of llm.c's format"),
    "mosaic": ("train/shard.00000.mds", bytes(99), "MosaicML's Streaming.*save them as one: np.save"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_hold_no_plain_ids_are_named(tmp_path: Path, name: str):
    file, content, message = REFUSED[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{Path(file).name} cannot be read: .*{message}"):
        open_dataset(tmp_path, block_size=8)


def test_arrays_of_other_kinds_are_refused(tmp_path: Path):
    for array in (np.ones(99), np.ones((9, 11), int), np.array(["a"])):
        np.save(tmp_path / "train.npy", array)
        with pytest.raises(InputError, match=r"train\.npy cannot be read: it is an array of"):
            open_dataset(tmp_path, block_size=8, splits=["train"])
    np.save(tmp_path / "train.npy", IDS.astype("u8"))
    assert open_dataset(tmp_path, block_size=8, splits=["train"]).train[:].dtype == np.int64
    write_litdata(tmp_path / "train.bin", "<i4")
    index = json.loads((tmp_path / "index.json").read_text())
    for change in ({"compression": "zstd"}, {"data_format": ["int"]}, {"data_format": ["no_header_tensor:0"]}):
        (tmp_path / "index.json").write_text(json.dumps(index | {"config": index["config"] | change}))
        with pytest.raises(InputError, match="litdata"):
            open_dataset(tmp_path, block_size=8, splits=["train"])


def test_a_damaged_index_json_is_named(tmp_path: Path):
    write_litdata(tmp_path / "train.bin", "<i4")
    index = json.loads((tmp_path / "index.json").read_text())
    for change in ({"config": None}, {"config": []}, {"chunks": ["a"]}, {"chunks": 5}, {"chunks": [{}]}):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(InputError, match=r"train\.bin cannot be read: the index\.json beside it is damaged"):
            open_dataset(tmp_path, block_size=8, splits=["train"])


def test_names_say_the_split(tmp_path: Path):
    def lengths() -> list[int]:
        data = open_dataset(tmp_path, block_size=8)
        return [len(data.train), len(data.val)]

    for name in ("a_train_2.npy", "b-Train.npy", "a_val_1.npy"):
        np.save(tmp_path / name, IDS)
    for name in ("train_val.npy", "trained.npy", "a_test.npy", "._a_train_2.npy"):
        np.save(tmp_path / name, IDS[:99])
    assert lengths() == [2 * len(IDS), len(IDS)]
    (tmp_path / "validation").mkdir()
    np.save(tmp_path / "validation/anything.npy", IDS)
    assert lengths() == [2 * len(IDS), 2 * len(IDS)]
    (tmp_path / "b-Train.npy").unlink()
    (tmp_path / "a_train_2.npy").unlink()
    with pytest.raises(InputError, match=r"train\.bin is missing.*need 'train' in their names"):
        lengths()


def test_a_single_file_is_cut(tmp_path: Path):
    path = tmp_path / "corpus_text_document.bin"
    write_megatron(path, "<i4")
    cut = len(IDS) * 9 // 10
    for name in (path, tmp_path / "corpus_text_document", tmp_path / "corpus_text_document.idx"):
        data = open_dataset(f"{name}", block_size=8)
        assert np.array_equal(data.train[:], IDS[:cut])
        assert np.array_equal(data.val[:], IDS[cut:])
        assert (data.name, data.folder) == ("corpus_text_document.bin", tmp_path)
    mixture = open_dataset(f"{path}:0.5,{path.with_suffix('')}:0.5", block_size=8)
    assert (len(mixture.train), mixture.end_of_text) == (2 * cut, END)
    with pytest.raises(InputError, match=r"names of its token files do not say .*or give one of"):
        open_dataset(tmp_path, block_size=8)

    path = path.rename(tmp_path / "corpus_val.bin")
    path.with_name("corpus_text_document.idx").rename(path.with_suffix(".idx"))
    assert len(open_dataset(path, block_size=8, splits=["val"]).val) == len(IDS)
    with pytest.raises(InputError, match=r"corpus_val\.bin is not the train split, judging by its name"):
        open_dataset(path, block_size=8)
    (tmp_path / "text.txt").write_text("the text itself " * 99)
    with pytest.raises(InputError, match="there is no dataset"):
        open_dataset(tmp_path / "text.txt", block_size=8)
    write_text(tmp_path / "ours", "abc" * 999, Tokenizer.characters("abc"))
    with pytest.raises(InputError, match=r"described by the meta\.json beside it; give their folder"):
        open_dataset(tmp_path / "ours/train.bin", block_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["megatron", "datatrove", "litdata", "streaming"])
def test_what_the_program_itself_writes_is_read(tmp_path: Path, program: str):
    """megatron-core 0.16, datatrove 0.10, litdata 0.2.76 and mosaicml-streaming 0.13, where they are installed."""
    path = tmp_path / "train"
    if program == "megatron":
        dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
        builder = dataset.IndexedDatasetBuilder(f"{path}.bin", dtype=dataset.DType.optimal_dtype(END + 1))
        for document in DOCUMENTS:
            builder.add_document(document.tolist(), [len(document)])
        builder.finalize(f"{path}.idx")
    elif program == "datatrove":
        tokenizer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
        file = tokenizer.TokenizedFile(str(path), "00000_unshuffled.ds", save_loss_metadata=True)
        for document in DOCUMENTS:
            file.write(document.tolist(), np.ones(len(document)))
        file.close()
    elif program == "litdata":
        torch = pytest.importorskip("torch")
        writer = pytest.importorskip("litdata.streaming.writer")
        loader = pytest.importorskip("litdata.streaming.item_loader")
        chunks = writer.BinaryWriter(str(path), chunk_bytes="1KB", item_loader=loader.TokensLoader())
        for number, document in enumerate(DOCUMENTS):
            chunks[number] = torch.from_numpy(document.astype(np.int32))
        chunks.done()
        chunks.merge()
    else:
        mosaic = pytest.importorskip("streaming.base.format.mds.writer")
        with mosaic.MDSWriter(out=str(path), columns={"tokens": "ndarray:uint16"}) as shards:
            for document in DOCUMENTS:
                shards.write({"tokens": document.astype(np.uint16)})
        with pytest.raises(InputError, match="MosaicML's Streaming"):
            open_dataset(tmp_path, block_size=8, splits=["train"])
        return
    data = open_dataset(tmp_path, block_size=8, splits=["train"])
    assert np.array_equal(data.train[:], IDS)
    assert data.separators == {END}
