"""The process and its console: cores, printing from the main process, formats of bytes and durations."""

import contextlib
import os
import sys
import time
from typing import Any

START_TIME = time.perf_counter()  # when the program began, without the import of torch


def is_main() -> bool:
    """True in the first process, by torchrun's RANK."""
    return os.environ.get("RANK", "0") == "0"


def available_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print0(*lines: str) -> None:
    """Print lines, if any, from the first process only."""
    if lines and is_main():
        print(*lines, sep="\n", flush=True)


class Expendable:
    """A stream for text that may be lost: a closed pipe or a full disk is no error."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def prepare_streams(is_output_expendable: bool) -> None:
    """Make stdout and stderr take any text: escape what they cannot encode, replace them where they are closed."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened would be stdout
        pass
    os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if number == 2 or is_output_expendable:
            stream = Expendable(stream)
        setattr(sys, name, stream)


def format_bytes(count: float) -> str:
    """Bytes to three digits, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """Seconds as 42 s, 3:07 min, 5:42:10 h or 3 d 4 h."""
    seconds = round(seconds)
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    if seconds < 60:
        return f"{seconds} s"
    if hours == 0:
        return f"{m}:{s:02d} min"
    if hours < 48:
        return f"{hours}:{m:02d}:{s:02d} h"
    return f"{hours // 24} d {hours % 24} h"
