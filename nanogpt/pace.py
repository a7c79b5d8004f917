"""Name a rank that is slower than the others, by times that the host knows without waiting for a device."""

import statistics
import time
from typing import Any

from torch import nn

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
    weights ranks wait in the forward pass already, so the time ends where it begins, and sees slow data alone.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, clock: Stopwatch, is_sharded: bool):
        self.ranks = ranks
        self.until = "start" if is_sharded else "end"
        self.clock = clock
        self.start_of_step: float | None = None
        self.seconds = 0.0
        self.steps = 0
        self.last_report = clock.seconds
        if is_sharded:
            model.register_forward_pre_hook(self._end_forward, prepend=True)  # before FSDP2's, which gathers
        elif ranks.store is not None:
            model.register_forward_hook(self._end_forward)

    def start(self) -> None:
        self.start_of_step = time.perf_counter()

    def _end_forward(self, *_: Any) -> None:
        if self.start_of_step is not None:  # None in further micro-batches, and in evaluations
            self.seconds += time.perf_counter() - self.start_of_step
            self.steps += 1
            self.start_of_step = None

    def report(self, step: int) -> None:
        """Once a minute: post this rank's time, and print the slowest rank if it stands out."""
        period = self.clock.seconds - self.last_report
        if self.ranks.store is None or period < PERIOD_S:
            return
        self.ranks.store.set(f"pace/{self.ranks.rank}", str(self.seconds / self.steps))
        keys = [f"pace/{rank}" for rank in range(self.ranks.size)]
        if self.ranks.is_main and self.ranks.store.check(keys):
            times = [float(text) for text in self.ranks.store.multi_get(keys)]  # some may be a minute older
            median = statistics.median_low(times)
            slowest = max(range(len(times)), key=times.__getitem__)
            share = (times[slowest] - median) * self.steps / period
            if times[slowest] > SLOW * median and share > MIN_SHARE:
                print0(
                    f"step {step}: {self.ranks.name(slowest)} is slow: {1e3 * times[slowest]:.3g} ms to the "
                    f"{self.until} of a first forward pass, median {1e3 * median:.3g} ms; the difference is "
                    f"{share:.0%} of a step"
                )
        self.seconds = 0.0
        self.steps = 0
        self.last_report = self.clock.seconds
