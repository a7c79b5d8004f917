"""Printing ends no run, and a script ends with its own status, whatever became of its output."""

import subprocess
import sys

import pytest
from conftest import environment

SCRIPT = """
import sys
from nanogpt.errors import InputError, RunStopped, run_script

def main():
    ending, *_ = sys.argv[1:]
    handle = open("/dev/null").fileno()
    for _ in range(int(sys.argv[3])):
        print("é → й", "\\udcff")
    print("warning", file=sys.stderr)
    if ending != "none":
        raise {"input": InputError, "stop": RunStopped, "interrupt": KeyboardInterrupt}[ending]("why")
    return 0 if handle > 2 else 1

run_script(main, is_output_expendable=sys.argv[2] == "log")
"""


def run(redirection: str, ending: str, kind: str, lines: int = 1, **env: str) -> subprocess.CompletedProcess[bytes]:
    shell = f'"$0" -c "$1" {ending} {kind} {lines} {redirection}'
    command = ["bash", "-o", "pipefail", "-c", shell, sys.executable, SCRIPT]
    return subprocess.run(command, env=environment() | env, capture_output=True, timeout=60)


@pytest.mark.parametrize("kind", ["log", "product"])
def test_what_stdout_cannot_encode_is_escaped(kind: str):
    done = run("", "none", kind, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.strip()) == (0, rb"\xe9 \u2192 \u0439 \udcff")
    assert run("", "none", kind, PYTHONUTF8="1").stdout.decode().strip() == r"é → й \udcff"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full", "| head -c1"])
@pytest.mark.parametrize(("ending", "status"), [("none", 0), ("stop", 3)])
def test_a_log_that_is_lost_changes_no_status(redirection: str, ending: str, status: int):
    lines = 10_000 if "head" in redirection else 1
    done = run(redirection, ending, "log", lines)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr
    if "2>" not in redirection:
        expected = ["error: why"] if status else []
        assert done.stderr.decode().splitlines() == ["warning", *expected]


def test_an_interrupt_is_no_traceback():
    done = run("", "interrupt", "log")
    assert (done.returncode, done.stderr.decode().splitlines()) == (130, ["warning", "interrupted"])


@pytest.mark.parametrize(("redirection", "status"), [(">/dev/full", 2), ("| head -c1", 141), (">&-", 0)])
def test_a_product_that_is_lost_is_an_error(redirection: str, status: int):
    done = run(redirection, "none", "product", lines=10_000)
    assert done.returncode == status
    assert (b"error: [Errno 28] No space left on device" in done.stderr) == (status == 2)
    assert b"Traceback" not in done.stderr
