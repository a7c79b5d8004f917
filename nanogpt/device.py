"""The device: which one, in which dtype, how much memory is free, its peak FLOP/s."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import torch

from nanogpt.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense bfloat16 peak of one GPU in FLOP/s, by a part of the device's name; the first match counts.
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


def seed_everything(number: int, deterministic: bool) -> None:
    """Seed torch; `deterministic` has CUDA use only algorithms that give equal bits each time."""
    torch.manual_seed(number)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition for it
        torch.use_deterministic_algorithms(True)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for `name`; with a local rank, that process's own GPU. Raises InputError where there is none."""
    if name == "auto":
        mps = local_rank is None and torch.backends.mps.is_available()  # several processes cannot share one
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device={name}: no such device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(
                f"device={name}: this machine has no usable CUDA device; use --device=cpu or --device=auto"
            )
        if device.index is not None and local_rank is not None:
            raise InputError(f"device={name}: several processes take a GPU each; use --device=cuda")
        if device.index is None:
            device = torch.device("cuda", local_rank or 0)
        if device.index is not None and device.index >= count:
            raise InputError(
                f"device=cuda:{device.index}: this machine has {count} CUDA device(s); start at most as many processes"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("device=mps: this machine has no Apple GPU that torch can use; use --device=cpu")
    elif device.type != "cpu":
        raise InputError(f"device={name}: not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. auto: CUDA bfloat16 from capability 8.0, else float16; a CPU bfloat16 only where
    that is fast; else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has units for products of bfloat16 matrices. Emulated, they are far slower than float32; by
    AVX-512's dot products alone they took 1.9 times as long on an Intel Xeon (runs/cpu_step)."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_amx_tile_supported()
    if platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on `device` (a CPU's without swapping); None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as file:
                free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return None
        with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where it has none
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, limit - used)
        return free
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    told = isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or told


def disable_malloc_trim() -> None:
    """Have the C library keep the memory that a step frees: it would return it to the system and, a page fault at a
    time, fetch it again at the next step, which takes longer than some of the arithmetic (runs/cpu_step)."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        library = ctypes.CDLL(None)
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def describe_device(device: torch.device) -> str:
    """The device in words, for a log line."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
