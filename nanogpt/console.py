"""Print from the main process, and format bytes and durations."""

import os
import sys
import time


def is_main() -> bool:
    """Whether this is the first process, by torchrun's word."""
    return os.environ.get("RANK", "0") == "0"


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


def format_bytes(count: float) -> str:
    """Bytes as a person says them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


START_TIME = time.perf_counter()  # when the program began, the import of torch not counted


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3:07 min, 5:42:10 h, 3 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02d}:{s:02d} h" if hours else f"{m}:{s:02d} min"
