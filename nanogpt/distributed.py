"""Which process this is, on which device, in which number format, and how several of them train one model."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt import InputError, RunStopped

PATIENCE_S = 600.0  # that a process waits for the others before it gives up
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


@dataclass(frozen=True)
class World:
    """This process among its fellows: rank of size, the device it computes on and the dtype of its matrix products."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision: weights stay float32, matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` (any shape) over all ranks; every rank gets it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """The `values` of all ranks, equal in shape, one after the other along the first dimension."""
        if self.size == 1:
            return values
        everything = values.new_empty(self.size * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(everything, values.contiguous())
        return everything

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Host tensors on this process's device; to a GPU they are copied in its own time, the host goes on."""
        if self.device.type != "cuda":
            return [t.to(self.device) for t in tensors]
        return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model`, its gradients averaged over the ranks when there are several."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_flops(self) -> float | None:
        """The device's dense bfloat16/float16 peak in FLOP/s; None where it is unknown or the dtype is float32."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        known = [peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name) and "Laptop" not in name]
        return known[0] if known else None

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def processes() -> int:
    """How many processes train together, by torchrun's word."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str = "auto", dtype: str = "auto", backend: str = "auto") -> World:
    """Join the processes that torchrun started (or be alone) and settle device and dtype.

    device: auto, cpu, cuda, cuda:N or mps; dtype: auto or a key of `DTYPES`; backend: auto, nccl or gloo.
    Raises InputError for a device, dtype or backend that this machine lacks.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    chosen = pick_device(device, local_rank if size > 1 else None)
    chosen_dtype = pick_dtype(dtype, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where a product stays in float32
    elif chosen.type == "cpu":
        disable_malloc_trim()
    if size > 1:
        if backend == "auto":
            backend = "nccl" if chosen.type == "cuda" else "gloo"
        elif backend == "nccl" and chosen.type != "cuda":
            raise InputError(
                f"backend=nccl: joins CUDA devices, and this process has {chosen.type}; use --backend=gloo"
            )
        patience = timedelta(seconds=PATIENCE_S)
        dist.init_process_group(backend, timeout=patience, device_id=chosen if backend == "nccl" else None)
    return World(rank, size, chosen, chosen_dtype)


def seed(number: int, deterministic: bool) -> None:
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


def is_main() -> bool:
    """Whether this is the first process, by torchrun's word."""
    return os.environ.get("RANK", "0") == "0"


def ignore_signal_to_save() -> None:
    """SIGUSR1, of which a process dies by default, does nothing until `catch_signals`."""
    if hasattr(signal, "SIGUSR1"):  # Windows has none
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def catch_signals() -> dict[str, bool]:
    """Which of SIGINT, SIGTERM and SIGUSR1, by name, have come from now on; a second Ctrl-C interrupts at once."""
    seen = {"SIGINT": False, "SIGTERM": False, "SIGUSR1": False}

    def note(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and seen[name]:
            raise KeyboardInterrupt
        seen[name] = True
        print0(f"{'saving' if name == 'SIGUSR1' else 'stopping'} after this step")

    for name in seen:
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), note)
    return seen


def print0(*lines: str) -> None:
    """Print lines, from the first process only. Where they go is no reason to end a run: a pipe that nobody reads any
    more, a full disk."""
    if not is_main():
        return
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    told = isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or told


def is_lost_process(error: BaseException) -> bool:
    """Whether `error` says that another process did not take part in a collective."""
    if isinstance(error, InputError) or not dist.is_available():
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def disable_malloc_trim() -> None:
    """Have the C library keep the memory that a step frees: it would return it to the system and, a page fault at a
    time, fetch it again at the next step, which takes longer than some of the arithmetic (runs/cpu_step)."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        library = ctypes.CDLL(None)
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def memory_hint(micro_batch: int, rows_per_process: int, block_size: int, free: int | None) -> str:
    """What to do where memory runs out: the flag for smaller micro-batches of the same steps."""
    told = f"too little memory for {micro_batch} rows of {block_size} tokens at a time"
    told += f" ({format_bytes(free)} were free)" if free else ""
    smaller = max((n for n in range(1, micro_batch // 2 + 1) if rows_per_process % n == 0), default=0)
    if not smaller:
        return f"{told}: try --activation_checkpointing=True and --loss_chunk=1024, or a smaller --block_size or model"
    return f"{told}: --micro_batch_size={smaller} takes fewer, and the steps stay as they are"


@contextlib.contextmanager
def explain_errors(remedy: str, before_update: bool = True) -> Iterator[None]:
    """Running out of memory becomes an InputError that says `remedy`; after the first update any InputError becomes a
    RunStopped. So does a process that does not answer."""
    try:
        yield
    except (RuntimeError, MemoryError, InputError) as error:
        if is_lost_process(error):
            why, rank = str(error).strip().splitlines()[0][:200], os.environ.get("RANK", "0")
            raise RunStopped(
                f"rank {rank} waited in vain for the others ({why}): one has died or hangs; see what each printed, "
                "then go on with --resume=auto"
            ) from error
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        told = str(error) if isinstance(error, InputError) else remedy
        raise (InputError if before_update else RunStopped)(told) from error


def try_compile(
    model: nn.Module, world: World, x: Tensor, y: Tensor, graphs: bool = False
) -> tuple[nn.Module, str | None]:
    """`model` compiled, and tried forward and backward on one batch x, y (B, T); where that fails, `model` itself and
    the reason in a line. Leaves no gradients.

    graphs: a GPU replays each pass as one CUDA graph instead of being handed its kernels one by one. A gradient then
    lies where the next pass puts its own, so each pass must be a whole step's. What was compiled is kept for later runs
    in ~/.cache/nanogpt, unless TORCHINDUCTOR_CACHE_DIR says where: torch's own choice is /tmp, which a restart empties.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written to
        kept = Path.home() / ".cache" / "nanogpt" / "compiled"
        kept.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    fast, reason = model, None
    try:
        fast = torch.compile(model, mode="reduce-overhead" if graphs else None)  # type: ignore[assignment]
        for _ in range(3 if graphs else 1):  # a graph is recorded in the second pass and replayed in the third
            with world.autocast():
                fast(x, y)[1].backward()
                with torch.no_grad():  # evaluation is another function to the compiler
                    model.eval()
                    fast(x, y)
            model.train()
            model.zero_grad(set_to_none=True)
    except Exception as error:  # the compiler and its backends raise whatever they like
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    model.train()
    model.zero_grad(set_to_none=True)
    return (model if reason else fast), reason


def describe(device: torch.device) -> str:
    """The device in words, for a log line."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def format_bytes(count: float) -> str:
    """Bytes as a person says them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
