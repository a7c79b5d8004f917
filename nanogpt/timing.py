"""Time steps, each program in a process of its own, and the matrix products to compare them with."""

import contextlib
import itertools
import multiprocessing
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt.device import synchronize
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.rendezvous import explain_errors

Steps = Iterator[list[float]]  # next() makes one step and returns the losses that became known during it
SMALL = 256  # rows of a product that is fast enough to try
SLOW_FLOPS = 1e10  # here a product of 2048 × 2048 takes two seconds
OpenSteps = Callable[..., tuple[World, Any, Steps]]  # the Any is for the parent process


class Round(NamedTuple):
    """Steps made in a row: the seconds of each, the losses that became known, the peak memory so far."""

    seconds: list[float]
    losses: list[float]
    memory: int | None  # in bytes; None: unknown


class Worker:
    """A program in a process of its own, which makes steps when asked to; `with` ends it."""

    def __init__(self, name: str, hint: str, open_steps: OpenSteps, *args: Any):
        """Call open_steps(*args) in the process and make the first step. hint: for running out of memory."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(worker_pipe, hint, open_steps, *args), daemon=True)
        start = time.perf_counter()
        self.process.start()
        worker_pipe.close()
        self.info = self._receive()
        self.first_step_s = time.perf_counter() - start

    def run(self, count: int, trace: str = "") -> Round:
        """Make steps. trace: file for a profile of them."""
        with contextlib.suppress(OSError):  # the process died, as `_receive` reports
            self.pipe.send((count, trace))
        return self._receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            reason = "killed by the system, usually for lack of memory" if code == -9 else "see its output above"
            raise InputError(f"{self.name}: the process died with exit code {code}: {reason}") from None
        if isinstance(answer, InputError):
            self.process.join()  # it is ending
            raise answer
        return answer


def _serve(pipe: Connection, hint: str, open_steps: OpenSteps, *args: Any) -> None:
    """Make steps for a `Worker` until it closes the pipe, or until an InputError, which it gets."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    memory_at_start = _resident_memory("VmRSS")
    try:
        with explain_errors(hint):
            world, info, steps = open_steps(*args)
            time_steps(steps, 1, world)
            pipe.send(info)
            while True:
                count, trace = pipe.recv()
                with torch.profiler.profile() if trace else contextlib.nullcontext() as profiler:
                    seconds, losses = time_steps(steps, count, world)
                if profiler:
                    profiler.export_chrome_trace(trace)
                memory = _resident_memory("VmHWM") - memory_at_start
                if world.device.type == "cuda":
                    memory = torch.cuda.max_memory_allocated()
                pipe.send(Round(seconds, losses, memory if memory > 0 else None))
    except InputError as error:
        pipe.send(error)
    except EOFError:
        pass


def time_steps(steps: Steps, count: int, world: World) -> tuple[list[float], list[float]]:
    """Make `count` steps; return the seconds of each and the losses that became known."""
    losses = []
    synchronize(world.device)
    marks = [_mark_time(world)]
    for _ in range(count):
        losses += next(steps)
        marks.append(_mark_time(world))
    synchronize(world.device)
    pairs = itertools.pairwise(marks)
    if world.device.type == "cuda":
        return [start.elapsed_time(end) / 1000 for start, end in pairs], losses
    return [end - start for start, end in pairs], losses


def _mark_time(world: World) -> Any:
    """The time in seconds; on a GPU an event, recorded when the GPU gets there, without the host waiting."""
    if world.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _resident_memory(field: str) -> int:
    """Bytes of this process in memory by Linux's VmRSS (now) or VmHWM (peak); 0 on other systems."""
    status = Path("/proc/self/status")  # getrusage's ru_maxrss would start from the parent process's
    match = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(match[1]) if match else 0


def measure_matmul_flops(world: World) -> float:
    """FLOP/s of products of square matrices in the dtype in use, a bound on what a step can reach on this device."""
    n, count = (8192, 20) if world.device.type == "cuda" else (2048, 10)
    if world.device.type == "cpu" and world.dtype != torch.float32:
        flops = 2 * SMALL**3 / min(_time_products(SMALL, 10, world))
        n = n if flops > SLOW_FLOPS else SMALL  # emulated, a large product takes a minute
    return 2 * n**3 / statistics.median(_time_products(n, count, world))


def _time_products(n: int, count: int, world: World) -> list[float]:
    """Seconds of each of `count` products of n × n matrices."""
    a = torch.randn(n, n, device=world.device, dtype=world.dtype)
    b = torch.randn(n, n, device=world.device, dtype=world.dtype)

    def products() -> Steps:
        while True:
            a @ b
            yield []

    time_steps(products(), 5, world)  # warmup
    return time_steps(products(), count, world)[0]
