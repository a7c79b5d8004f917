"""Name a rank that is slower than the others, by times that the host knows without waiting for a device."""

import statistics
import time
from typing import Any

from nanogpt.console import print0
from nanogpt.metrics import Stopwatch
from nanogpt.rendezvous import Ranks

PERIOD_S = 60.0  # of training between two reports, so that the mean is of many steps
SLOW = 1.3  # times the median
MIN_SHARE = 0.05  # of a step, below which a difference is not worth a line


class Pace:
    """The mean time from the start of a step to the end of its first forward pass, on each rank.

    In that time a rank reads its rows and computes alone; later the ranks wait for each other, and a step takes equally
    long on all. On a GPU it is the time of the host, which sees slow data and a slow CPU, not a slow GPU. With sharded
    weights ranks already wait during the forward pass: there it is the time until that begins, plus the time of the
    first block for each block. Compiled blocks are not timed.
    """

    def __init__(self, model: Any, ranks: Ranks, clock: Stopwatch, is_sharded: bool):
        self.ranks = ranks
        self.clock = clock
        self.until = "end"
        self.starts_at: float | None = None  # of what is timed; None in further micro-batches and in evaluations
        self.seconds = 0.0
        self.block_times: list[float] = []
        self.steps = 0
        self.last_report = clock.seconds
        if ranks.store is None:
            return
        if not is_sharded:
            model.register_forward_hook(self._end_forward)
            return
        # FSDP2's own hooks gather before a forward pass, and may wait after it.
        block = model.blocks[0]
        self.num_blocks = len(model.blocks)
        if block._compiled_call_impl:
            self.until = "start"
            model.register_forward_pre_hook(self._end_forward, prepend=True)
        else:
            model.register_forward_pre_hook(self._begin_forward, prepend=True)
            block.register_forward_pre_hook(self._begin_block)
            block.register_forward_hook(self._end_block, prepend=True)

    def start(self) -> None:
        self.starts_at = time.perf_counter()

    def _end_forward(self, *_: Any) -> None:
        if self.starts_at is not None:
            self.seconds += time.perf_counter() - self.starts_at
            self.steps += 1
            self.starts_at = None

    def _begin_forward(self, *_: Any) -> None:
        if self.starts_at is not None:
            self.seconds += time.perf_counter() - self.starts_at

    def _begin_block(self, *_: Any) -> None:
        if self.starts_at is not None:
            self.starts_at = time.perf_counter()

    def _end_block(self, *_: Any) -> None:
        if self.starts_at is not None:
            self.block_times.append(time.perf_counter() - self.starts_at)
            self.steps += 1
            self.starts_at = None

    def report(self, step: int) -> None:
        """Once a minute: post this rank's time, and print the slowest rank if it stands out."""
        period = self.clock.seconds - self.last_report
        if self.ranks.store is None or period < PERIOD_S:
            return
        mean = self.seconds / self.steps
        if self.block_times:  # the median, because a pause of the machine would count once for each block
            mean += self.num_blocks * statistics.median(self.block_times)
        self.ranks.store.set(f"pace/{self.ranks.rank}", str(mean))
        keys = [f"pace/{rank}" for rank in range(self.ranks.size)]
        if self.ranks.is_main and self.ranks.store.check(keys):
            times = [float(text) for text in self.ranks.store.multi_get(keys)]  # some may be a minute older
            median = statistics.median_low(times)
            slowest = max(range(len(times)), key=times.__getitem__)
            share = (times[slowest] - median) * self.steps / period
            if times[slowest] > SLOW * median and share > MIN_SHARE:
                print0(
                    f"step {step}: {self.ranks.name(slowest)} is slow: {times[slowest]:.3g} s to the "
                    f"{self.until} of a first forward pass, median {median:.3g} s; the difference is "
                    f"{share:.0%} of a step"
                )
        self.seconds = 0.0
        self.block_times = []
        self.steps = 0
        self.last_report = self.clock.seconds
