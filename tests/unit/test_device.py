"""The device: its choice, its dtype, its peak."""

from pathlib import Path

import pytest
import torch

from nanogpt import device
from nanogpt.device import free_memory, peak_flops, pick_device, pick_dtype
from nanogpt.errors import InputError

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "gpu", "meta"])
def test_pick_device_refuses_a_missing_device(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"device={name}: "):
        pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_pick_device_gives_each_rank_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", local_rank=1) == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda:0")
    with pytest.raises(InputError, match="device=cuda:2"):
        pick_device("auto", local_rank=2)
    with pytest.raises(InputError, match=r"device=cuda:1: .*--device=cuda"):
        pick_device("cuda:1", local_rank=1)


def test_pick_device_shares_no_apple_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    assert pick_device("auto", local_rank=0) == torch.device("cpu")


def test_pick_dtype_takes_bfloat16_where_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch):
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert pick_dtype("auto", CUDA) == dtype
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch):
    sizes = {"mem_get_info": (10, 80), "memory_reserved": 60, "memory_allocated": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size)
    assert free_memory(CUDA) == 10 + 60 - 5


def test_free_memory_of_a_container_counts_its_cached_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 90000\nactive_file 8000\nfile 110000\n")
    assert free_memory(torch.device("cpu")) == 300_000 + 98_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (free_memory(torch.device("cpu")) or 0) > 1_000_000


PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12}
NO_PEAKS = {"NVIDIA GeForce RTX 4090 Laptop GPU": None, "Tesla of tomorrow": None}


@pytest.mark.parametrize(("name", "peak"), [*PEAKS.items(), *NO_PEAKS.items()])
def test_peak_flops_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(CUDA, torch.bfloat16) == peak
    assert peak_flops(CUDA, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
