"""Requests to a running training: stop, save, begin the final decay. All ranks act on the same ones."""

import contextlib
import signal
from collections.abc import Iterable
from typing import Any, NamedTuple

from nanogpt.console import print0


class Control(NamedTuple):
    """The requests of one update, summed over the ranks in the same all-reduce as the loss.

    Ranks may see a signal at different times, so they act on the sum.
    """

    interrupt: float = 0.0  # ranks that got SIGINT
    terminate: float = 0.0  # ranks that got SIGTERM
    save: float = 0.0  # ranks that want a checkpoint
    decay_steps: float = 0.0  # updates of the final decay that is to begin now; 0: not yet (only the main process)


class EvaluationStopped(Exception):
    """An evaluation was abandoned for a request to stop."""


class Requests:
    """The agreed requests, as the training loop obeys them: a step after they were made."""

    def __init__(self) -> None:
        self.exit_status = 0  # 130 after SIGINT, 143 after SIGTERM
        self.save = False
        self.decay_steps = 0

    def add(self, controls: Iterable[Control]) -> None:
        for control in controls:
            if control.interrupt and not self.exit_status:
                self.exit_status = 130
            if control.terminate:
                self.exit_status = 143
            self.save |= bool(control.save)
            self.decay_steps = int(control.decay_steps) or self.decay_steps


NOTES = {
    "SIGINT": "stopping after this step; Ctrl-C again ends at once",
    "SIGTERM": "stopping after this step",
    "SIGUSR1": "saving after this step",
}


class SignalCatcher:
    """Remembers SIGINT, SIGTERM and SIGUSR1 from now on; a second SIGINT interrupts at once.

    can_save: False where there is nothing to save: SIGINT and SIGTERM then end the process at once.
    """

    def __init__(self, can_save: bool = True) -> None:
        self.received: set[str] = set()
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if can_save and hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and name in self.received:
            raise KeyboardInterrupt
        if name not in self.received:
            self.received.add(name)  # first: the line below may fail
            with contextlib.suppress(RuntimeError):  # the signal interrupted another print
                print0(NOTES[name])

    def control(self, save_due: bool = False, decay_steps: int = 0) -> Control:
        """This rank's requests for the coming step. SIGUSR1 asks for one checkpoint and is forgotten then."""
        save_requested = "SIGUSR1" in self.received
        if save_requested:  # forget only a signal that was seen: another may arrive between these lines
            self.received.discard("SIGUSR1")
        return Control(
            interrupt=float("SIGINT" in self.received),
            terminate=float("SIGTERM" in self.received),
            save=float(save_requested or save_due),
            decay_steps=float(decay_steps),
        )


def ignore_save_signal() -> None:
    """Ignore SIGUSR1, which would end the process, until there is something to save."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
