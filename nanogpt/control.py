"""Signals: stop after this step, or save."""

import signal
from typing import Any

from nanogpt.console import print0


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
