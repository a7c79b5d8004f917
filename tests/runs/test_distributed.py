"""Two processes against one. Run by torchrun, this file is also the worker: train.py's main, once for each of RUNS."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ALL_OF_IT, Run, environment, flags, metrics, steps

import train
from nanogpt import checkpoint, distributed
from nanogpt.data.rows import Rows
from nanogpt.device import pick_device, pick_dtype
from nanogpt.errors import InputError

BASE = {"max_iters": 50, "eval_interval": 25, "eval_iters": 3, "lr_decay_iters": 50, "n_layer": 2}
RUNS: dict[str, dict[str, Any]] = {
    "accumulated": BASE | {"batch_size": 4, "gradient_accumulation_steps": 4},
    "cut": BASE | {"batch_size": 12, "gradient_accumulation_steps": 1, "row_order": "epoch"},
    "muon": BASE
    | {"optimizer": "muon", "arch": "modern", "bias": False, "n_layer": 3, "n_kv_head": 1, "batch_size": 4}
    | {"gradient_accumulation_steps": 3, "batch_growth_tokens": 3000},
    "masked": BASE | ALL_OF_IT | {"batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 3e-3},
    "stopped": BASE | {"batch_size": 2, "gradient_accumulation_steps": 2, "dropout": 0.1},
}


def work(folder: Path) -> None:
    """Both ranks: train, and write down which rows were read. In "stopped" the second rank alone gets a signal."""
    rank, read = int(os.environ["RANK"]), []
    os.chdir(folder)
    original_rows, original_rate = Rows.__getitem__, train.TrainConfig.learning_rate_at

    def getitem(self: Rows, rows: slice) -> Any:
        read.append((rows.start, rows.stop))
        return original_rows(self, rows)

    def learning_rate_at(config: train.TrainConfig, at: int) -> float:
        if rank == 1 and config.out_dir == "stopped" and at == 10 and not config.resume:
            signal.raise_signal(signal.SIGTERM)
        return original_rate(config, at)

    def join(*args: Any, **keys: Any) -> None:
        if not dist.is_initialized():  # the processes of one torchrun can find each other once only
            original_join(*args, **keys)

    original_join, dist.init_process_group = dist.init_process_group, join
    distributed.World.close = lambda world: None  # type: ignore[method-assign]
    Rows.__getitem__, train.TrainConfig.learning_rate_at = getitem, learning_rate_at  # type: ignore[method-assign]
    for name, keys in RUNS.items():
        read.clear()
        sys.argv = ["train.py", *flags(**{"dataset": "letters"} | keys, out_dir=name)]
        status = train.main()
        dist.barrier()  # as if the next began when the last had ended
        if status:
            sys.argv.append("--resume=True")
            train.main()
        Path(f"{name}-{rank}.json").write_text(json.dumps({"status": status, "rows": read}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(letters: Path, one_and_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done RUNS."""
    folder = tmp_path_factory.mktemp("two")
    for dataset in (letters, one_and_two / "one", one_and_two / "two"):
        (folder / dataset.name).symlink_to(dataset)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, __file__, folder], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "told").write_text(done.stdout)
    return folder


def rows_of(folder: Path, name: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    first, second = (json.loads((folder / f"{name}-{rank}.json").read_text())["rows"] for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", ["accumulated", "cut", "muon", "masked"])
def test_two_processes_are_one(two: Path, run: Run, name: str):
    for dataset in ("one", "two"):
        Path(dataset).symlink_to(two / dataset)
    run(out_dir="alone", **RUNS[name])
    for field in ("loss", "train_loss", "val_loss", "grad_norm"):
        ours, theirs = (metrics(out_dir, "step", field) for out_dir in (two / name, "alone"))
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        tolerance = 1e-3 if field == "grad_norm" else 1e-5
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=tolerance)
    assert len(metrics("alone", "loss")) == 50
    ours, theirs = (checkpoint.load(Path(out_dir) / "ckpt/step-000050") for out_dir in (two / name, "alone"))
    assert ours.model.keys() == theirs.model.keys()  # no "module." of the wrapper
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert ours.state["samples"] == theirs.state["samples"]


def test_each_row_is_read_once(two: Path):
    for name, micro_batch in (("accumulated", 4), ("cut", 6)):
        halves = rows_of(two, name)
        assert {last - first for half in halves for first, last in half} == {micro_batch}
        step_rows = RUNS[name]["batch_size"] * RUNS[name]["gradient_accumulation_steps"]
        for step in range(50):
            seen = [k for half in halves for span in half for k in range(*span) if k // step_rows == step]
            assert sorted(seen) == [*range(step * step_rows, (step + 1) * step_rows)]
        assert {span[0] % step_rows < step_rows // 2 for span in halves[0]} == {True}


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two: Path):
    for rank in (0, 1):
        assert json.loads((two / f"stopped-{rank}.json").read_text())["status"] == 143
    told = (two / "told").read_text()
    assert told.count("stopped at step 12 by a signal; saved") == 1
    assert told.count("resuming stopped/ckpt/step-000012") == 1  # one process speaks for both
    for half, offset in zip(rows_of(two, "stopped"), (0, 2), strict=True):
        assert half == [[4 * k + offset, 4 * k + offset + 2] for k in range(50)]
    assert steps(two / "stopped") == [25, 50]
    assert [step for (step,) in metrics(two / "stopped", "step")] == sorted([*range(1, 51), 0, 25, 50])


def test_one_process_takes_over_from_two(two: Path, run: Run):
    """A checkpoint does not know how many processes wrote it."""
    run(out_dir="one", **RUNS["cut"])
    folder = Path("taken")
    (folder / "ckpt").mkdir(parents=True)
    (folder / "ckpt/step-000025").symlink_to(two / "cut/ckpt/step-000025")
    assert run(out_dir=folder, resume=True, **RUNS["cut"]) == 0
    ours = [pair for pair in metrics(folder, "step", "loss") if pair[0] > 25]
    theirs = [pair for pair in metrics("one", "step", "loss") if pair[0] > 25]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)
    assert len(ours) == 25


# ---- one process


ALONE_TOO_LONG = """
import os, sys, time, torch
from nanogpt import distributed, run_script

def main():
    distributed.PATIENCE_S = 3.0
    world = distributed.start("cpu", "float32")
    world.all_reduce_sum(torch.ones(1))
    if world.rank == 1:
        time.sleep(60) if sys.argv[1] == "hangs" else os._exit(1)
    with distributed.explain_errors("memory"):
        world.all_reduce_sum(torch.ones(1))

run_script(main)
"""


@pytest.mark.parametrize("other", ["hangs", "dies"])
def test_a_process_that_waits_in_vain_says_so(other: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", ALONE_TOO_LONG, other]
    first, second = (
        subprocess.Popen(command, env=meeting | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    )
    try:
        told = first.communicate(timeout=60)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 3
    assert re.search(r"error: rank 0 waited in vain for the others \(.+\): one has died or hangs; see what each", told)
    assert "Traceback" not in told


def test_rows_must_divide_by_the_processes(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"= 8 rows per step do not divide by 3 processes"):
        run(batch_size=2, gradient_accumulation_steps=4)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", r"device=cuda: this machine has no usable CUDA device; use --device=cpu"),
        ("cuda:7", r"device=cuda:7: this machine has no usable CUDA device"),
        ("mps", r"device=mps: .*use --device=cpu"),
        ("gpu", r"device=gpu: no such device; use auto, cpu, cuda"),
        ("meta", r"device=meta: not supported"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_devices_and_formats_of_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda:0")
    with pytest.raises(InputError, match=r"device=cuda:2: this machine has 2 CUDA device"):
        pick_device("auto", 2)
    for capability, dtype in {(7, 5): torch.float16, (8, 0): torch.bfloat16, (12, 0): torch.bfloat16}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, at=capability: at)
        assert pick_dtype("auto", torch.device("cuda:0")) == dtype
    for native in (True, False):
        monkeypatch.setattr(distributed, "cpu_has_bfloat16", lambda at=native: at)
        assert pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16


def test_peaks(monkeypatch: pytest.MonkeyPatch):
    """By name, the more exact name first; against a float32 product no peak is known."""
    world = distributed.World(0, 1, torch.device("cuda:0"), torch.bfloat16)
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA B200": 2250e12,
        "Tesla of tomorrow": None,
    }
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, at=name: at)
        assert world.peak_flops() == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B200")
    assert distributed.World(0, 1, torch.device("cuda:0"), torch.float32).peak_flops() is None
    assert distributed.World(0, 1, torch.device("cpu"), torch.bfloat16).peak_flops() is None


if __name__ == "__main__":
    work(Path(sys.argv[1]))
