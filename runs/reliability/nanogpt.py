"""The behavior of a nanoGPT checkout in the cases for which docs/reliability.md makes promises about our program.

    python runs/reliability/nanogpt.py --reference=PATH_OF_A_NANOGPT_CHECKOUT

Runs its own train.py on a tiny model and breaks things on purpose, as our tests do with ours. Its code is executed.
Needs data/shakespeare_char prepared there. Writes nanogpt.json beside itself.
"""

import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs" / "shakespeare_char_cpu")]

from compare_with_nanogpt import commit, machine  # noqa: E402

from configurator import key, parse  # noqa: E402
from nanogpt.errors import InputError, run_script  # noqa: E402

TINY = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=2 --log_interval=1 --block_size=32 "
    "--batch_size=4 --n_layer=2 --n_head=2 --n_embd=64 --dropout=0.0 --always_save_checkpoint=True"
)
LOSS = re.compile(r"iter (\d+): loss (\S+),")


@dataclass
class ReliabilityConfig:
    """The checkout to test."""

    reference: str = key("", "nanoGPT checkout with data/shakespeare_char prepared; its code is executed")
    flips: int = key(300, "bits to flip in its checkpoint, one at a time", ge=1)


class Evil:
    """A pickle that creates a directory when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def main() -> None:
    config, _ = parse(ReliabilityConfig, description="Break nanoGPT's runs.")
    reference = Path(config.reference).resolve()
    if not (reference / "data" / "shakespeare_char" / "train.bin").is_file():
        raise InputError(f"--reference={config.reference}: give a nanoGPT checkout with data/shakespeare_char prepared")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train(reference, f"--out_dir={folder}/good --max_iters=20 --eval_interval=10")
        for case in (not_a_number, resumed, flipped, killed_in_a_save, full_disk, two_writers, evil_data):
            results[case.__name__] = case(reference, folder, config)
            print(f"{case.__name__}: {results[case.__name__]}", flush=True)
    report = {"command": "python runs/reliability/nanogpt.py --reference=CHECKOUT", "reference": commit(reference)}
    report |= {"machine": machine(), "found": results}
    Path(__file__).with_name("nanogpt.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def train(reference: Path, flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *shlex.split(TINY), *shlex.split(flags)]
    return subprocess.run(command, cwd=reference, capture_output=True, text=True, **options)


def is_readable(path: Path) -> bool:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def not_a_number(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Train with a learning rate that breaks the weights."""
    done = train(
        reference, f"--out_dir={folder}/nan --max_iters=20 --eval_interval=5 --learning_rate=1e30 --decay_lr=False"
    )
    losses = LOSS.findall(done.stdout)
    saved = torch.load(folder / "nan" / "ckpt.pt", weights_only=True)["model"].values()
    return {
        "status": done.returncode,
        "updates made after the first NaN": sum(loss == "nan" for _, loss in losses),
        "its only checkpoint holds NaN": any(bool(t.isnan().any()) for t in saved),
    }


def resumed(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Compare twenty updates with ten, a stop, and ten more."""
    whole = dict(LOSS.findall(train(reference, f"--out_dir={folder}/whole --max_iters=20 --eval_interval=10").stdout))
    train(reference, f"--out_dir={folder}/parts --max_iters=10 --eval_interval=10 --lr_decay_iters=5000")
    flags = f"--out_dir={folder}/parts --max_iters=20 --eval_interval=10 --init_from=resume"
    parts = dict(LOSS.findall(train(reference, flags).stdout))
    later = [step for step in parts if int(step) > 10]
    return {"equal losses after the stop": sum(parts[s] == whole[s] for s in later), "of": len(later)}


def flipped(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Flip single bits in its checkpoint, and load it as its train.py and sample.py do."""
    generator = random.Random(1)
    content = (folder / "good" / "ckpt.pt").read_bytes()
    path = folder / "flipped.pt"
    accepted = 0
    for _ in range(config.flips):
        damaged = bytearray(content)
        bit = generator.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        accepted += is_readable(path)
    return {"flips": config.flips, "loaded without a word": accepted}


def killed_in_a_save(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Kill it while it overwrites its checkpoint; the model is larger, so that writing takes a while."""
    out = folder / "killed"
    large = "--n_embd=1024 --n_head=8 --eval_interval=1 --eval_iters=1 --max_iters=1000"
    command = [sys.executable, "train.py", *shlex.split(TINY), *shlex.split(large), f"--out_dir={out}"]
    lost = 0
    tries = 5
    for _ in range(tries):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command, cwd=reference, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout
        saves = (line for line in process.stdout if line.startswith("saving checkpoint"))
        next(saves)  # the first one is complete …
        next(saves)  # … when the second begins
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        lost += not is_readable(out / "ckpt.pt")
    return {"kills": tries, "runs lost": lost}


def full_disk(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Resume on a full disk: no file may grow beyond half of a checkpoint."""
    import resource

    out = folder / "full"
    shutil.copytree(folder / "good", out)
    limit = (out / "ckpt.pt").stat().st_size // 2

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = f"--out_dir={out} --max_iters=40 --eval_interval=10 --init_from=resume"
    done = train(reference, flags, preexec_fn=fill)
    return {"status": done.returncode, "its checkpoint can still be read": is_readable(out / "ckpt.pt")}


def two_writers(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Start two runs at once in one folder."""
    command = [sys.executable, "train.py", *shlex.split(TINY), f"--out_dir={folder}/both", "--max_iters=20"]
    both = [
        subprocess.Popen([*command, f"--learning_rate={r}"], cwd=reference, stdout=subprocess.DEVNULL)
        for r in (1e-3, 2e-3)
    ]
    return {"statuses": [process.wait() for process in both]}


def evil_data(reference: Path, folder: Path, config: ReliabilityConfig) -> dict[str, Any]:
    """Train on a dataset whose meta.pkl runs code."""
    name = "evil_by_reliability"
    sentinel = folder / "sentinel"
    data = reference / "data" / name
    shutil.copytree(reference / "data" / "shakespeare_char", data)
    (data / "meta.pkl").write_bytes(pickle.dumps(Evil(sentinel)))
    train(reference, f"--out_dir={folder}/evil --max_iters=1 --dataset={name}")
    shutil.rmtree(data)
    return {"its code was run": sentinel.exists()}


if __name__ == "__main__":
    run_script(main)
