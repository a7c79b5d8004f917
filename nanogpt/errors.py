"""The two errors that users see, and how a script ends."""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Wrong usage or bad input. The message says what is wrong and how to fix it; scripts end with status 2."""


class RunStopped(Exception):
    """A run stopped to protect what it has. The message says why and how to continue; scripts end with status 3."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its return value (0 if None), or report its error and exit with 2 or 3."""
    try:
        status = main() or 0
        sys.stdout.flush()
        sys.exit(status)
    except (InputError, RunStopped) as error:
        sys.stdout.flush()
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error on rank {rank}"
        for line in str(error).splitlines():
            print(f"{prefix}: {line}", file=sys.stderr)
        status = 3 if isinstance(error, RunStopped) else 2
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            sys.stderr.flush()
            os._exit(status)  # at a normal exit the destructor of a broken process group may abort the process
        sys.exit(status)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
