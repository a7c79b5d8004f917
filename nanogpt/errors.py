"""The two errors that users see, and how a script ends."""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave cannot be used: the message says what, why and what to do. Scripts end with status 2."""


class RunStopped(Exception):
    """A run ended early to protect what it has: the message says why and what to do. Scripts end with status 3."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: its return value (0 if None), or 2 or 3 after a line for each fault it raised."""
    try:
        status = main() or 0
        sys.stdout.flush()
        sys.exit(status)
    except (InputError, RunStopped) as error:
        sys.stdout.flush()
        rank = os.environ.get("RANK", "0")
        for line in str(error).splitlines():
            print(f"error{'' if rank == '0' else f' on rank {rank}'}: {line}", file=sys.stderr)
        status = 3 if isinstance(error, RunStopped) else 2
        processes = sys.modules.get("torch.distributed")
        if processes and processes.is_available() and processes.is_initialized():
            sys.stderr.flush()
            os._exit(status)  # at a normal exit the destructor of a process group that broke may abort the process
        sys.exit(status)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
