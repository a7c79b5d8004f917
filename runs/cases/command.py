"""Run the scripts of a checkout, for the cases."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A deed, and the function that does it in a checkout.

    run: (checkout, an empty folder) -> whether what came of it is right, and what was seen.
    """

    deed: str
    run: Callable[[Path, Path], tuple[bool, str]]


class Result(NamedTuple):
    """How a script ended."""

    status: int
    output: str  # stdout, then stderr

    @property
    def is_clear_error(self) -> bool:
        """Status 2 with lines of "error: …" and no traceback."""
        return self.status == 2 and "error: " in self.output and "Traceback" not in self.output

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else "no output"


def run(checkout: Path, script: str, *arguments: str, timeout: float = 120, **environment: str) -> Result:
    """Run a script of a checkout, with its own package, and wait for its end."""
    env = {**os.environ, "PYTHONPATH": str(checkout), **environment}
    process = subprocess.run(
        [sys.executable, str(checkout / script), *arguments],
        cwd=checkout,
        env=env,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
    )
    return Result(process.returncode, process.stdout + process.stderr)
