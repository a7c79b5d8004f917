"""The two errors that users see, and how a script ends."""

import difflib
import faulthandler
import gc
import os
import sys
from collections.abc import Callable, Iterable

from nanogpt.console import prepare_streams


class InputError(Exception):
    """Wrong usage or bad input. The message says what is wrong and how to fix it; scripts end with status 2."""


class RunStopped(Exception):
    """A run stopped to protect what it has. The message says why and how to continue; scripts end with status 3."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise InputError with a line for each problem, if there are any."""
    if lines := list(problems):
        raise InputError("\n".join(lines))


def suggest(word: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """The end of an error message: the known name that `word` resembles, or what else helps."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {prefix}{close[0]}?" if close else otherwise


def first_line(error: Exception) -> str:
    """The first line of its message, shortened; without one its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def run_script(main: Callable[[], int | None], is_output_expendable: bool = False) -> None:
    """Run a script's `main` and exit with its return value (0 if None), or report its error and exit with 2 or 3.

    is_output_expendable: what it prints is a log, whose loss is no error.
    """
    prepare_streams(is_output_expendable)
    faulthandler.enable(2)  # a data file that is cut while it is read ends the process with a bus error
    lines: list[str] = []
    try:
        status = main() or 0
        sys.stdout.flush()
    except (InputError, RunStopped) as error:
        status = 3 if isinstance(error, RunStopped) else 2
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error on rank {rank}"
        lines = [f"{prefix}: {line}" for line in str(error).splitlines()]
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        status = 141
    except OSError as error:  # as a full disk under stdout
        status = 2
        lines = [f"error: {error}"]
    except KeyboardInterrupt:
        status = 130
        lines = ["interrupted"]

    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    distributed = sys.modules.get("torch.distributed")
    if status in (2, 3, 130) and distributed and distributed.is_available() and distributed.is_initialized():
        os._exit(status)  # at a normal exit a broken process group, or a thread that waits in it, may abort the process
    gc.freeze()  # at its end the interpreter would search all of torch's modules for garbage, for a quarter of a second
    sys.exit(status)
