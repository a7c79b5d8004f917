"""The short forms of chaos.py, in a process of its own because it forks, and of nodes.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment


def run_chaos(**counts: int) -> list[str]:
    """The lines that chaos.py prints."""
    command = [sys.executable, str(Path(__file__).with_name("chaos.py")), *(f"--{k}={n}" for k, n in counts.items())]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_killed_run_ends_like_an_undisturbed_one():
    *kills, summary = run_chaos(kills=4, pair_kills=0, sharded_kills=0, seed=1)
    assert len(kills) == 4
    assert re.match(r"4 kills of 1 process.*; (\d) of \1 runs ended as undisturbed", summary)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_ends_like_an_undisturbed_one():
    (*_, summary) = run_chaos(kills=0, pair_kills=2, sharded_kills=0, seed=1)
    assert re.match(r"2 kills of 2 process.*; (\d) of \1 runs ended as undisturbed", summary)


@pytest.mark.slow
def test_two_nodes_survive_a_kill_and_end_at_once_without_a_shared_directory():
    command = [sys.executable, str(Path(__file__).with_name("nodes.py")), "worker", "unshared", "hang"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["train", "worker", "unshared", "hang"]
