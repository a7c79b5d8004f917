"""Print from the main process, and format bytes and durations."""

import os
import sys
import time

START_TIME = time.perf_counter()  # when the program began, without the import of torch


def is_main() -> bool:
    """True in the first process, by torchrun's RANK."""
    return os.environ.get("RANK", "0") == "0"


def print0(*lines: str) -> None:
    """Print lines from the first process only. A closed pipe or a full disk does not end the run."""
    if not is_main():
        return
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


def format_bytes(count: float) -> str:
    """Bytes to three digits, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
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
