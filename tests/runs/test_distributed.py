"""Two processes against one. torchrun starts this file too: each rank then trains all of RUNS."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXTURE, NO_SIZES, ROOT, Run, environment, flags, metrics, steps, torchrun
from random_models import build_gpt2
from torch import Tensor

import train
from model import Attention
from nanogpt import checkpoint, pace
from nanogpt.data.rows import EvalWindows, Rows
from nanogpt.errors import RunStopped
from nanogpt.schedule import StepSchedule
from nanogpt.sharding import local

STEPS = 12
BASE = {"max_iters": STEPS, "eval_interval": 6, "eval_iters": 3, "lr_decay_iters": STEPS, "n_layer": 2}
MODERN = {
    "arch": "modern",
    "bias": False,
    "optimizer": "muon",
    "n_layer": 3,
    "n_kv_head": 1,
    "batch_growth_tokens": 2000,
    "look_back": True,
    "ngram_targets": 3,
}
LEVERS = {"activation_checkpointing": True, "loss_chunk": 7, "log_layers": True, "log_interval": 1}
FROM_BASE = NO_SIZES | {"init_from": "base", "batch_size": 2, "gradient_accumulation_steps": 4}
RUNS: dict[str, dict[str, Any]] = {
    "split": BASE | {"batch_size": 12, "gradient_accumulation_steps": 1, "row_order": "epoch"},
    "muon": BASE | MODERN | {"batch_size": 4, "gradient_accumulation_steps": 3},
    "masked": BASE | MIXTURE | {"batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 3e-3},
    "sharded": BASE | MIXTURE | {"shards": 2, "batch_size": 2, "gradient_accumulation_steps": 4},
    "sharded muon": BASE | MODERN | {"shards": 2, "batch_size": 4, "gradient_accumulation_steps": 3} | LEVERS,
    "sharded base": BASE | FROM_BASE | {"shards": 2, "block_size": 8, "micro_batch_size": "auto"},  # cropped
    "lora": BASE | FROM_BASE | {"lora_rank": 2, "block_size": ...},
    "stopped": BASE | {"batch_size": 2, "gradient_accumulation_steps": 2, "dropout": 0.1},
    "stopped in an evaluation": BASE | {"batch_size": 2, "gradient_accumulation_steps": 2, "shards": 2},
    "broken": BASE | {"batch_size": 2, "gradient_accumulation_steps": 2, "shards": 2},
}
SLOW = {"split": "data", "sharded": "blocks"}  # runs in which this is slow on the second rank
SLOW_S = 0.05
STOP_AT = 3  # the second rank gets SIGTERM in the update after this step of "stopped"
ALL_STEPS = sorted([*range(1, STEPS + 1), 0, 6, STEPS])  # of metrics.jsonl, with the evaluations
BREAK_AT = 3  # the second rank's part of a gradient is NaN in this step of "broken"


def train_all(folder: Path) -> None:
    """Train RUNS as one rank, and write down the rows that it read; resume what a signal stopped."""
    os.chdir(folder)
    rank = int(os.environ["RANK"])
    read: list[tuple[int, int]] = []
    pending: list[str] = []  # names of runs to be stopped
    out_dirs: list[str] = []
    norms: list[Tensor] = []  # of the gradients in "broken"
    weights: list[Tensor] = []  # there, this rank's parts before the broken update
    after: list[Tensor] = []  # there, the parameters
    original_norm = train.gradient_norm
    original_getitem = Rows.__getitem__
    original_windows = EvalWindows.__getitem__
    original_lr_scale = StepSchedule.lr_scale
    original_attend = Attention.forward
    original_save = checkpoint.Writer.save

    def getitem(rows: Rows, span: slice) -> Any:
        read.append((span.start, span.stop))
        if rank == 1 and SLOW.get(out_dirs[-1]) == "data":
            time.sleep(SLOW_S)
        return original_getitem(rows, span)

    def attend(*arguments: Any) -> Any:
        if rank == 1 and SLOW.get(out_dirs[-1]) == "blocks":
            time.sleep(SLOW_S)
        return original_attend(*arguments)

    def gradient_norm(parameters: Collection[Tensor]) -> Tensor:
        if out_dirs[-1] == "broken":
            if len(norms) == BREAK_AT - 1:
                weights[:] = [local(p.detach()).clone() for p in parameters]
                next(iter(parameters)).grad.mul_(math.nan if rank == 1 else 1.0)  # type: ignore[union-attr]
            norms.append(original_norm(parameters))
            after[:] = parameters
            return norms[-1]
        return original_norm(parameters)

    def windows(windows: EvalWindows, span: slice) -> Any:
        if rank == 1 and read and pending == ["stopped in an evaluation"]:
            pending.clear()
            signal.raise_signal(signal.SIGTERM)
        return original_windows(windows, span)

    def lr_scale(schedule: StepSchedule, step: int) -> float:
        if rank == 1 and step == STOP_AT and pending == ["stopped"]:
            pending.clear()
            signal.raise_signal(signal.SIGTERM)
        return original_lr_scale(schedule, step)

    def save(writer: checkpoint.Writer, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
        """As the original; at the last step the main process keeps the whole tensors, gathered by torch."""
        if writer.group and state["step"] == STEPS:
            whole = [{k: v.full_tensor().clone() for k, v in part.items() if v.dim()} for part in (model, optimizer)]
            if rank == 0:
                torch.save(whole, f"{out_dirs[-1]}-whole.pt")
        original_save(writer, model, optimizer, state)

    Attention.forward = attend  # type: ignore[method-assign]
    checkpoint.Writer.save = save  # type: ignore[method-assign]
    Rows.__getitem__ = getitem  # type: ignore[method-assign]
    train.gradient_norm = gradient_norm
    EvalWindows.__getitem__ = windows  # type: ignore[method-assign]
    StepSchedule.lr_scale = lr_scale  # type: ignore[method-assign]
    for name, keys in RUNS.items():
        read.clear()
        out_dirs.append(name)
        if rank == 0:
            print(f"\n== {name}", flush=True)
        pace.PERIOD_S = 0.1 if name in SLOW else 60.0
        pending[:] = [name] if name.startswith("stopped") else []
        sys.argv = ["train.py", *flags(**{"dataset": "letters"} | keys, out_dir=name)]
        try:
            status: int | str = train.main()
        except RunStopped as error:  # in the last run, since it leaves the process group
            status = str(error)
            assert all(torch.equal(local(p.detach()), old) for p, old in zip(after, weights, strict=True))
        if status == 143:
            sys.argv.append("--resume=True")
            train.main()
        Path(f"{name}-{rank}.json").write_text(json.dumps({"status": status, "rows": read}))


@pytest.fixture(scope="module")
def two(letters: Path, one_and_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have trained RUNS."""
    folder = tmp_path_factory.mktemp("two")
    build_gpt2(vocab_size=4).save_pretrained(folder / "base")
    for dataset in (letters, one_and_two / "one", one_and_two / "two"):
        (folder / dataset.name).symlink_to(dataset)
    command = [*torchrun(2), __file__, folder]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.mark.parametrize(
    "name",
    ["split", "muon", "masked", "sharded", "sharded muon", "sharded base", "lora"],
)
def test_two_processes_equal_one(two: Path, run: Run, name: str):
    for folder in ("one", "two", "base"):
        Path(folder).symlink_to(two / folder)
    run(out_dir="alone", **RUNS[name] | {"shards": 1})
    for field in ("loss", "train_loss", "val_loss", "grad_norm"):
        ours = dict(metrics(two / name, "step", field))
        assert ours == pytest.approx(dict(metrics("alone", "step", field)), rel=1e-3 if field == "grad_norm" else 1e-5)
    assert len(metrics("alone", "loss")) == STEPS
    ours, theirs = (checkpoint.load(Path(out_dir) / f"ckpt/step-{STEPS:06}") for out_dir in (two / name, "alone"))
    assert ours.model.keys() == theirs.model.keys()  # without DDP's prefix
    for weight, tensor in theirs.model.items():
        if tensor.dim() == 2:  # keys' biases have only noise as gradients, which AdamW enlarges
            torch.testing.assert_close(ours.model[weight], tensor, rtol=1e-3, atol=1e-3)
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert ours.state["samples"] == theirs.state["samples"]


@pytest.mark.parametrize("name", ["sharded", "sharded muon"])
def test_saved_shards_are_the_whole_tensors(two: Path, name: str):
    saved = checkpoint.load(two / name / f"ckpt/step-{STEPS:06}")
    for ours, theirs in zip((saved.model, saved.optimizer), torch.load(two / f"{name}-whole.pt"), strict=True):
        assert theirs
        assert {key for key, tensor in ours.items() if tensor.dim()} == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two: Path):
    output = (two / "stdout").read_text()
    assert output.count(f"stopped at step {STOP_AT + 2} by a signal; saved") == 1  # read a step late
    assert output.count(f"resuming stopped/ckpt/step-{STOP_AT + 2:06d}") == 1  # the first rank alone prints
    for rank in (0, 1):
        report = json.loads((two / f"stopped-{rank}.json").read_text())
        assert report["status"] == 143
        assert report["rows"] == [[4 * k + 2 * rank, 4 * k + 2 * rank + 2] for k in range(STEPS)]  # each row once
    assert steps(two / "stopped") == [6, STEPS]
    assert [step for (step,) in metrics(two / "stopped", "step")] == ALL_STEPS


def test_a_signal_to_one_rank_stops_an_evaluation_of_both(two: Path):
    output = (two / "stdout").read_text()
    assert output.count("stopped at step 6 by a signal; saved") == 1
    assert output.count("resuming stopped in an evaluation/ckpt/step-000006") == 1
    for rank in (0, 1):
        assert json.loads((two / f"stopped in an evaluation-{rank}.json").read_text())["status"] == 143
    lines = metrics(two / "stopped in an evaluation", "step")
    assert [step for (step,) in lines] == ALL_STEPS


def test_a_gradient_that_is_broken_on_one_rank_stops_both_and_changes_no_weights(two: Path):
    for rank in (0, 1):
        status = json.loads((two / f"broken-{rank}.json").read_text())["status"]
        assert str(status).startswith(f"step {BREAK_AT}, ")
        assert "not finite" in status
    assert steps(two / "broken") == []


def test_a_slow_rank_is_named(two: Path):
    outputs = dict(part.split("\n", 1) for part in (two / "stdout").read_text().split("\n== ")[1:])
    for name in SLOW:
        named = re.findall(r"(rank \d) on \S+ is slow: .* s to the end of a first forward", outputs[name])
        assert named.count("rank 1") > 2 * named.count("rank 0")  # the machine may stop either for a moment


def test_one_process_resumes_the_run_of_two(two: Path, run: Run):
    Path("resumed/ckpt").mkdir(parents=True)
    Path("resumed/ckpt/step-000006").symlink_to(two / "split/ckpt/step-000006")
    assert run(out_dir="resumed", resume=True, **RUNS["split"]) == 0
    ours = dict(metrics("resumed", "step", "loss"))
    theirs = {step: loss for step, loss in metrics(two / "split", "step", "loss") if step > 6}
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shards", "sizes"),
    [("sharded", 0, (4, 2, 1, 3, 4)), ("sharded muon", 0, (4, 2, 1, 3, 4)), ("sharded muon", 2, (4, 2, 4, 6, 2))],
)
def test_a_sharded_run_resumes_on_any_number_of_processes(
    run: Run, letters: Path, name: str, shards: int, sizes: tuple[int, ...]
):
    keys = RUNS[name] | {"batch_size": 12, "gradient_accumulation_steps": 1, "dataset": letters, "eval_interval": 5}
    keys |= {"batch_growth_tokens": 0, "max_iters": 30, "lr_decay_iters": 30}
    run(out_dir="alone", **keys | {"shards": 1})
    for n, processes in enumerate(sizes, 1):
        leg = keys | {"shards": shards, "out_dir": "legs", "resume": "auto", "max_iters": 6 * n, "micro_batch_size": 1}
        command = [*torchrun(processes), ROOT / "train.py", *flags(**leg)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (dict(metrics(out_dir, "step", "loss")) for out_dir in ("legs", "alone"))
    assert len(ours) == 30
    assert ours == pytest.approx(theirs, rel=1e-5)


# --- Processes that fail

LOSE_A_RANK = """
import os, signal, sys, tempfile, torch
from pathlib import Path
import torch._dynamo, torch.distributed.device_mesh, torch.distributed.fsdp  # here, so that no rank waits for them
from load import build_model
from model import GPTConfig
from nanogpt import checkpoint, distributed, rendezvous, sharding
from nanogpt.errors import run_script
from nanogpt.run_dir import RunDir

def lose(*_):
    os.kill(os.getpid(), deed)

def save(model, world):
    if world.rank == 1:
        sharding.dist.send = lose
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Writer(RunDir(Path(folder)), 0, 0.0, None, world.save_group) as writer:
            writer.save(dict(model.named_parameters()), {}, {"step": 1})
            writer.wait()
            world.ranks.run_on_main(writer.finish)

def main():
    rendezvous.ANSWER_S = 4.0
    rendezvous.LISTEN_S = 0.5
    ranks = rendezvous.join(60.0)
    if deed == signal.SIGSTOP:  # else some ranks notice only when others end
        ranks.timeout_s = 4.0
    world = distributed.start("cpu", "float32", ranks=ranks, shards=int(sys.argv[1]))
    model = build_model(GPTConfig(1, 1, 8, vocab_size=8, block_size=8), None, world)
    model = world.wrap_ddp(model)
    idx = torch.zeros(1, 8, dtype=torch.long)
    for step in range(2):
        if step and sys.argv[2] == "save":
            save(model, world)
        if step and world.rank == 1:
            lose()
        with rendezvous.explain_errors("memory", ranks):
            model(idx, idx)[1].backward()

# Two runs at once, of copies of this process, which has imported torch.
survivors, lost = [], []
for deed, port in ((signal.SIGSTOP, sys.argv[3]), (signal.SIGKILL, sys.argv[4])):
    os.environ["MASTER_PORT"] = port
    for rank in range(int(os.environ["WORLD_SIZE"])):
        process = os.fork()
        if not process:
            os.environ["RANK"] = str(rank)
            sys.exit(run_script(main))
        (lost if rank == 1 else survivors).append(process)
print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in survivors))
os.kill(lost[0], signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("place", "size", "shards"),
    [
        ("step", 3, 1),
        pytest.param("step", 4, 2, marks=pytest.mark.slow),
        pytest.param("step", 4, 4, marks=pytest.mark.slow),
        pytest.param("save", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_lose_another_name_it_and_end_with_status_3(place: str, size: int, shards: int):
    with socket.socket() as one, socket.socket() as two:
        ports = []
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    address = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size)}
    command = [sys.executable, "-c", LOSE_A_RANK, str(shards), place, *ports]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment() | address, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert output.split() == ["3"] * 2 * (size - 1), errors  # where it hangs and where it dies
    lost = f"rank 1 on {socket.gethostname()} did not answer: it hangs or has died"
    expected = 2 * (size - 1)
    if place == "save":  # where it dies, the others still send when the main process, and its store, have ended
        lost, expected = "rank 1 did not send its part of a checkpoint", size
    assert errors.count(lost) == expected, errors
    assert "Traceback" not in errors


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
