"""Trials of this machine's speed, made once for a CPU, a release of torch and a shape; their outcomes are kept."""

import contextlib
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanogpt.device import pick_dtype
from nanogpt.distributed import World
from nanogpt.files import atomic_write, cache_folder, read_json

MIN_BFLOAT16_SPEEDUP = 1.4  # products must gain this much before whole steps are faster too (runs/cpu_step)
MAX_ROWS = 2048  # limit of a product's rows: more are hardly faster
MAX_MULTIPLICATIONS = 2**30  # limit of a product: about 20 ms in float32
SMALL_SIZE = 256  # emulated, a larger product may take seconds
HOPELESS = 0.7  # bfloat16's speed over float32's: below it on small products, the large ones are skipped
TRIAL_S = 0.1  # least seconds of measurement
MIN_ROUNDS = 3


def try_dtypes(world: World, dtype: str, rows: int, n_embd: int, n_inner: int) -> World:
    """`world` with the dtype of the key `dtype`; auto on a CPU: the faster one, by a trial with products of this shape.

    rows: tokens of a forward pass. All ranks take the main one's outcome. A sharded model has its dtype already.
    """
    if dtype != "auto" or world.device.type != "cpu" or world.mesh:
        return replace(world, dtype=pick_dtype(dtype, world.device))
    outcome = bfloat16_speedup(rows, n_embd, n_inner) if world.is_main else 0.0
    speedup = world.all_reduce_sum(torch.tensor(outcome, dtype=torch.float64)).item()
    faster = torch.bfloat16 if speedup >= MIN_BFLOAT16_SPEEDUP else torch.float32
    return replace(world, dtype=faster, bfloat16_speedup=speedup)


def describe_dtype(world: World) -> str:
    """The dtype and, where a trial chose it, the outcome: float32 (bfloat16: 0.5 × float32 here)."""
    trial = f" (bfloat16: {world.bfloat16_speedup:.2g} × float32 here)" if world.bfloat16_speedup else ""
    return world.dtype_name + trial


def bfloat16_speedup(rows: int, n_embd: int, n_inner: int) -> float:
    """The speed of a linear layer in bfloat16 on this CPU over that in float32: forward and backward, by autocast.

    No flag of a CPU determines it: by AVX-512's dot products (avx512_bf16) an Intel Xeon takes twice as long in
    bfloat16 as in float32 (runs/cpu_step), an AMD EPYC half as long.
    """
    shape = trial_shape(rows, n_embd, n_inner)
    return load_or_measure("bfloat16", shape, lambda: measure_bfloat16_speedup(shape))


def trial_shape(rows: int, n_embd: int, n_inner: int) -> list[int]:
    """Sizes of the layer to try: rounded, so that similar models share an outcome, and few enough rows."""
    n_embd, n_inner = round_size(n_embd), round_size(n_inner)
    rows = min(rows, MAX_ROWS, MAX_MULTIPLICATIONS // (n_embd * n_inner))
    return [round_size(max(rows, 1)), n_embd, n_inner]


def round_size(size: int) -> int:
    """The nearest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: powers of two, and those one and a half times."""
    power = 2 ** (size.bit_length() - 1)
    return min((power, 3 * power // 2, 2 * power), key=lambda rounded: abs(rounded - size))


def load_or_measure(name: str, shape: Sequence[int], measure: Callable[[], float]) -> float:
    """The outcome of the trial `name` on this machine: as stored in ~/.cache/nanogpt, else of `measure()`."""
    trial = {"trial": name, "cpu": cpu_model(), "torch": torch.__version__, "shape": list(shape)}
    file = f"{name}-{hashlib.sha256(json.dumps(trial).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # none yet, damaged, or no home
        stored = read_json(cache_folder("trials") / file)
        outcome = stored.pop("outcome", None)
        if stored == trial and isinstance(outcome, float) and 0 < outcome < math.inf:
            return outcome
    outcome = float(f"{measure():.3g}")
    # With a read-only home, or none, the next start measures again.
    with contextlib.suppress(OSError, RuntimeError), atomic_write(cache_folder("trials") / file) as partial:
        partial.write_text(json.dumps({**trial, "outcome": outcome}, indent=1) + "\n")
    return outcome


def cpu_model() -> str:
    """The CPU's name, and a hash of its instruction sets: virtual machines of one name differ in them."""
    cpu = cpu_info()
    name = cpu.get("model name") or cpu.get("CPU part") or platform.processor() or platform.machine()
    flags = cpu.get("flags") or cpu.get("Features") or ""
    return f"{name} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def cpu_info() -> dict[str, str]:
    """The fields of the first processor in Linux's /proc/cpuinfo; {} on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in fields}


def measure_bfloat16_speedup(shape: Sequence[int]) -> float:
    """Compare the dtypes on `shape` (rows, inputs, outputs), or only on less where bfloat16 is slow."""
    speedup = compare_dtypes([min(size, SMALL_SIZE) for size in shape])
    return speedup if speedup < HOPELESS else compare_dtypes(shape)


def compare_dtypes(shape: Sequence[int]) -> float:
    """bfloat16's speed over float32's, measured alternately, in one thread's computing time.

    Threads would wait for each other where other programs run, and a wrong outcome would be kept.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layers = [linear_layer(dtype, shape) for dtype in (torch.float32, torch.bfloat16)]
    for layer in layers:
        layer()  # warmup
    seconds = [0.0, 0.0]
    rounds = 0
    while rounds < MIN_ROUNDS or sum(seconds) < TRIAL_S:
        for i, layer in enumerate(layers):
            seconds[i] += time_call(layer)
        rounds += 1
    torch.set_num_threads(num_threads)
    return seconds[0] / seconds[1]


def linear_layer(dtype: torch.dtype, shape: Sequence[int]) -> Callable[[], Any]:
    """Forward and backward of a linear layer, as autocast to `dtype` does it. Draws no random numbers."""
    rows, inputs, outputs = shape
    x = torch.ones(rows, inputs, requires_grad=True)
    weight = torch.ones(outputs, inputs, requires_grad=True)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = F.linear(x, weight)
        torch.autograd.grad(y.sum(), (x, weight))  # given the gradient of y, torch would import its compiler

    return run


def time_call(function: Callable[[], Any]) -> float:
    """Seconds of this thread's work in a call."""
    start = time.thread_time()
    function()
    return time.thread_time() - start
