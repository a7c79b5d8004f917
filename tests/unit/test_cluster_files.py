"""cluster/ and docs/cluster.md: valid shell, options of Slurm, SkyPilot and torchrun, keys of train.py."""

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from torch.distributed.run import get_args_parser

import train

SLURM = (ROOT / "cluster/slurm.sh").read_text(encoding="utf-8")
SKYPILOT = yaml.safe_load((ROOT / "cluster/skypilot.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
# Of sbatch 22.05 and skypilot 0.10, as far as they may be of use here.
SBATCH_OPTIONS = """job-name nodes ntasks ntasks-per-node gpus-per-node gres cpus-per-task mem time signal requeue
    open-mode output error partition account qos exclusive constraint array chdir"""
SKYPILOT_FIELDS = "name resources num_nodes workdir envs secrets file_mounts volumes setup run config"


def train_flags(shell: str) -> set[str]:
    """Keys after each `train.py` of a command, whose lines may be continued."""
    commands = re.findall(r"train\.py (.*)", shell.replace("\\\n", " "))
    return {name for command in commands for name in re.findall(r"--(\w+)=", command)}


def test_cluster_scripts_are_valid_shell():
    for script in (SLURM, SKYPILOT["setup"], SKYPILOT["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_cluster_options_exist():
    options = re.findall(r"^#SBATCH --([\w-]+)", SLURM, flags=re.MULTILINE)
    assert len(options) == SLURM.count("#SBATCH") >= 8
    assert set(options) <= set(SBATCH_OPTIONS.split())
    assert SKYPILOT.keys() <= set(SKYPILOT_FIELDS.split())
    assert (ROOT / SKYPILOT["envs"]["CONFIG"]).exists()


def test_cluster_commands_have_keys_of_train():
    keys = {field.name for field in dataclasses.fields(train.TrainConfig)}
    for text in (SLURM, SKYPILOT["run"], PAGE):
        found = train_flags(text)
        assert found
        assert found <= keys
    pages = re.findall(r"config/\w+\.py", SLURM + PAGE)
    assert pages
    assert all((ROOT / page).exists() for page in pages)


def test_cluster_commands_have_options_of_torchrun():
    """Parsed by torchrun's own parser."""
    num_commands = 0
    for text in (SKYPILOT["run"], *re.findall(r"^```\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)):
        for command in re.findall(r"(?:torchrun|torch\.distributed\.run) (.*)", text.replace("\\\n", " ")):
            plain = re.sub(r"\$\([^()]*(?:\(\(.*?\)\)[^()]*)?\)", "1", command)  # what the shell would insert
            args = get_args_parser().parse_args(shlex.split(plain))
            assert args.training_script == "train.py"
            assert args.rdzv_backend == "c10d"
            num_commands += 1
    assert num_commands == 2


@pytest.mark.parametrize(
    ("statuses", "requeues"),
    [
        ([0], 0),
        ([2], 0),
        ([143] * 3 + [0], 3),
        ([3] * 11, 10),  # a run that diverged ends so at each start
        (([3] * 9 + [143]) * 2 + [0], 20),  # failures far apart
        ([143] * 25, 20),  # MAX_RESTARTS
    ],
)
def test_slurm_requeues_what_another_start_may_mend(tmp_path: Path, statuses: list[int], requeues: int):
    """With an srun that ends in each of these statuses in turn."""
    for name, body in (("srun", 'exit "$STATUS"'), ("scontrol", 'echo "$1" >>scontrol.log')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_ADDR": "a", "SLURM_JOB_ID": "7"}
    environment["MAX_RESTARTS"] = "20"
    for count, status in enumerate(statuses):
        restart = {"STATUS": str(status), "SLURM_RESTART_COUNT": str(count)}
        done = subprocess.run(["bash", ROOT / "cluster/slurm.sh"], cwd=tmp_path, env=environment | restart)
        log = tmp_path / "scontrol.log"
        done_requeues = log.read_text().count("requeue") if log.exists() else 0
        assert done.returncode == (0 if done_requeues == count + 1 else status)
        if done_requeues == count:
            break
    assert done_requeues == requeues
