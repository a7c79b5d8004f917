"""What is refused of nanoGPT's ckpt.pt."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_gpt2, save_as_nanogpt

from nanogpt.errors import InputError
from nanogpt.interop.huggingface import read_weights

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": True, "vocab_size": 100, "dropout": 0.1}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("good") / "ckpt.pt"
    save_as_nanogpt(build_gpt2(), path, model_args=ARGS, config={"dataset": "openwebtext"})
    return torch.load(path)


class Evil:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("zipped", [True, False])
def test_read_nanogpt_runs_no_code(tmp_path: Path, good: dict[str, Any], zipped: bool):
    sentinel, path = tmp_path / "sentinel", tmp_path / "ckpt.pt"
    torch.save(good | {"config": Evil(sentinel)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"posix\.mkdir"):
        read_weights(path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": torch.zeros(1)}, "no weights under 'model'"),
        ({"model": {"iter": 3}}, "no weights under 'model'"),
        ({"model_args": None}, "no 'model_args'"),
        ({"model_args": {}}, "n_layer=None"),
        ({"model_args": ARGS | {"dropout": "0.1"}}, "dropout or bias"),
        ({"model_args": ARGS | {"dropout": 1.5}}, "dropout or bias"),
        ({"model_args": ARGS | {"bias": 1}}, "dropout or bias"),
    ],
)
def test_read_nanogpt_refuses_content(tmp_path: Path, good: dict[str, Any], changes: dict[str, Any], message: str):
    torch.save(good | changes, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path)


def test_read_nanogpt_refuses_missing_and_cut_files(tmp_path: Path, good: dict[str, Any]):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(InputError, match="No such file"):
        read_weights(path)
    torch.save(good, path)
    weights = read_weights(path)
    assert (weights.train_config, weights.config["dropout"]) == ({"dataset": "openwebtext"}, 0.1)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"cannot be read .*give a ckpt\.pt that nanoGPT's"):
        read_weights(path)
    torch.save(good | {"config": None}, path)
    assert read_weights(path).train_config == {}
