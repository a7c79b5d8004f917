"""Run cluster/slurm.sh under a Slurm of one machine: USR1 before the limit, requeue, resume, a killed process.

    apt-get install slurm-wlm munge && python runs/cluster/slurm.py > runs/cluster/slurm.txt     (as root)

Starts munged, slurmctld and two slurmd, which have host names of their own, with slurm.conf in a temporary directory,
and stops them at the end. The job has a limit of two minutes, of which Slurm's signal leaves one; its steps are slowed
to last longer than that.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import ROOT, assert_same_checkpoint, environment, flags, metrics
from small_data import LETTERS, Source

from nanogpt.data.write import write_dataset
from nanogpt.text.tokenizer import Tokenizer

# Each step waits, so that a tiny model needs longer than the limit.
SLOW_PYTHON = """#!/bin/bash
exec {python} -c '
import sys, time, runpy
sys.path.insert(0, ".")
from nanogpt.schedule import StepSchedule
lr_scale = StepSchedule.lr_scale
def slow(self, step):
    time.sleep({seconds})
    return lr_scale(self, step)
StepSchedule.lr_scale = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
' "$@"
"""
STEPS = 240
KEYS = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "max_iters": STEPS,
    "lr_decay_iters": STEPS,
    "eval_interval": 100,
    "log_interval": 20,
    "learning_rate": 1e-3,
}


def start_slurm(folder: Path) -> list[subprocess.Popen[bytes]]:
    text = (ROOT / "runs/cluster/slurm.conf").read_text().replace("HOST", socket.gethostname().split(".")[0])
    (folder / "slurm.conf").write_text(text.replace("DIR", str(folder)))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "/run/munge"], check=True)
    commands = [
        ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground", "--force"],
        ["slurmctld", "-D"],
        *(["unshare", "--uts", "bash", "-c", f"hostname {name} && exec slurmd -D"] for name in ("n1", "n2")),
    ]
    daemons = []
    for command in commands:
        with (folder / f"{command[0]}.out").open("a") as file:
            daemons.append(subprocess.Popen(command, stdout=file, stderr=file))
        time.sleep(1.0)
    return daemons


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def submit(folder: Path, name: str, *options: str) -> str:
    arguments = flags(**KEYS, dataset=folder / "letters", out_dir=folder / name)
    resources = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    log = f"--output={folder / name}.log"
    answer = call("sbatch", *resources, log, *options, str(ROOT / "cluster/slurm.sh"), *arguments)
    return answer.split()[-1]


def state_of(job: str) -> str:
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    match = re.search(r"JobState=(\w+)", done.stdout)
    return match[1] if match else "gone"


def wait_for_end(job: str, seconds: float) -> str:
    before = ""
    deadline = time.monotonic() + seconds
    start = time.monotonic()
    while time.monotonic() < deadline:
        state = state_of(job)
        if state != before:
            print(f"  {time.monotonic() - start:5.0f} s  job {job}: {state}", flush=True)
            before = state
        if state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "gone"):
            return state
        time.sleep(0.5)
    raise TimeoutError(f"job {job} is {before}")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    source = Source(1)
    splits = {"train": [source.draw(20_000)], "val": [source.draw(2_000)]}
    write_dataset(folder / "letters", splits, Tokenizer.characters(LETTERS))
    python = folder / "python"
    os.environ |= environment() | {"PYTHON": str(python), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    os.chdir(ROOT)
    daemons = start_slurm(folder)
    try:
        time.sleep(3.0)
        print(call("sinfo", "--version").strip())
        print(call("sinfo", "--Node", "--long"))
        python.write_text(SLOW_PYTHON.format(python=sys.executable, seconds=0.001))
        python.chmod(0o755)
        print("undisturbed, --time=10")
        assert wait_for_end(submit(folder, "undisturbed", "--time=10"), 120) == "COMPLETED"

        python.write_text(SLOW_PYTHON.format(python=sys.executable, seconds=0.25))
        print(f"interrupted, --time=2 --signal=B:USR1@60, {STEPS} steps that take {0.25 * STEPS:.0f} s or more")
        job = submit(folder, "interrupted", "--time=2", "--signal=B:USR1@60")
        assert wait_for_end(job, 900) == "COMPLETED"
        compare(folder, "interrupted")

        print("a process killed by SIGKILL")
        job = submit(folder, "killed", "--time=10")
        while not (folder / "killed/ckpt/step-000100").exists():
            time.sleep(0.1)
        python.write_text(SLOW_PYTHON.format(python=sys.executable, seconds=0.001))
        victims = call("pgrep", "-f", f"out_dir={folder}/killed").split()
        kill_rank_1(victims)
        assert wait_for_end(job, 600) == "COMPLETED"
        compare(folder, "killed")
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
        for name in ("undisturbed", "interrupted", "killed"):
            if (log := folder / f"{name}.log").exists():
                print(f"\n---- {name}.log\n{log.read_text()}")
    shutil.rmtree(folder)


def kill_rank_1(pids: list[str]) -> None:
    """SIGKILL to the process of rank 1."""
    for pid in pids:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if b"RANK=1" in environ and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            print("  kill -9 of rank 1")
            os.kill(int(pid), signal.SIGKILL)


def compare(folder: Path, name: str) -> None:
    assert_same_checkpoint(folder / "undisturbed", folder / name, STEPS)
    assert metrics(folder / name) == metrics(folder / "undisturbed")
    loss = metrics(folder / name, "val_loss")[-1][0]
    print(f"  validation loss {loss:.4f}; weights, optimizer and metrics are those of the undisturbed run, bit for bit")


if __name__ == "__main__":
    main()
