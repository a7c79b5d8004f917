"""The device: which one, its dtype, its free memory, its peak FLOP/s."""

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch

from nanogpt.errors import InputError

CGROUP = Path("/sys/fs/cgroup")  # the container's limits, where there is one

# Dense bfloat16 peak of one GPU in FLOP/s, by a part of the device's name; the first match wins.
# Source: NVIDIA's data sheets, the figures without sparsity.
PEAK_FLOPS = {
    "B200": 2250e12,
    "B100": 1800e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch. deterministic: restrict CUDA to algorithms with reproducible results."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS requires for it
        torch.use_deterministic_algorithms(True)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for auto, cpu, cuda, cuda:N or mps; each local rank has its own GPU.

    Raises InputError for a device that this machine lacks.
    """
    if name == "auto":
        # Several processes cannot share an Apple GPU.
        has_mps = local_rank is None and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, index = name.partition(":")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device=mps: this machine has no Apple GPU that torch can use; use --device=cpu")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if kind != "cuda" or not re.fullmatch("[0-9]*", index):
        raise InputError(f"device={name}: unknown device; use auto, cpu, cuda, cuda:N or mps")

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError(f"device={name}: this machine has no usable CUDA device; use --device=cpu or --device=auto")
    if index and local_rank is not None:
        raise InputError(f"device={name}: each process takes its own GPU; use --device=cuda")
    number = int(index or local_rank or 0)
    if number >= count:
        hint = f"use cuda:0 to cuda:{count - 1}" if local_rank is None else f"start at most {count} processes"
        raise InputError(f"device=cuda:{number}: this machine has {count} CUDA device(s); {hint}")
    return torch.device("cuda", number)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products.

    auto: on CUDA bfloat16 from compute capability 8.0, else float16; elsewhere float32. On a CPU bfloat16 may be
    faster: `trials.try_dtypes` measures that, once the model is known.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense bfloat16/float16 peak in FLOP/s; None where unknown or the dtype is float32."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name:
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on `device`, on a CPU without swapping; None where unknown."""
    if device.type == "cuda":
        cache = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, of freed tensors
        return torch.cuda.mem_get_info(device)[0] + cache
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):  # the limit of a container; "max" where there is none
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])  # files in memory, which give way
        free = min(free, limit - used + cached)
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` means that memory ran out, on any device, or that no memory is large enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    parts = ("can't allocate memory", "out of memory", "_ALLOC_FAILED", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(part in message for part in parts)


def disable_malloc_trim() -> None:
    """Make the C library keep the memory that a step frees.

    It would return it to the system and fetch it again at the next step, page fault by page fault, which takes longer
    than some of the arithmetic (runs/cpu_step).
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 2**30) or library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older glibc takes 32 MB at most


def describe_device(device: torch.device) -> str:
    """The device in words, for a log line."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
