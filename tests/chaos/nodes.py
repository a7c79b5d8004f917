"""Two torchrun agents on this machine stand for two nodes: they train, resume, are killed, and lack a shared out_dir.

    python tests/chaos/nodes.py > runs/cluster/nodes.txt     (all scenarios)
    python tests/chaos/nodes.py unshared agent

Prints a line for each scenario. Ends at the first that fails with status 1, and leaves its folder for inspection.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import ROOT, assert_same_checkpoint, environment, flags, metrics, steps
from small_data import Source, write_letters

STEPS = 400
KEYS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "max_iters": STEPS,
    "lr_decay_iters": STEPS,
    "eval_interval": 50,
    "learning_rate": 1e-3,
    "dataset": "letters",
}
PATIENCE_S = 180.0


class Node:
    """A torchrun agent with its processes, in a directory of its own."""

    def __init__(
        self,
        home: Path,
        number: int,
        port: int,
        arguments: list[str],
        nnodes: str = "2",
        restarts: int = 0,
        processes: int = 1,
        shares_store: bool = False,  # torchrun's default, with which a new agent cannot join the others (torch 2.13)
    ):
        self.port = port
        self.processes = processes
        self.home = home / f"node{number}"
        self.log = home / f"node{number}.log"
        self.home.mkdir(exist_ok=True)
        if not (self.home / "letters").exists():
            (self.home / "letters").symlink_to(home / "letters")
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}"]
        launcher += [f"--nproc_per_node={processes}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{port}"]
        launcher += ["--local_addr=127.0.0.1", f"--max-restarts={restarts}"]
        if nnodes != "2":
            launcher.append("--rdzv_conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3")
        with self.log.open("a") as file:
            self.agent = subprocess.Popen(
                [*launcher, str(ROOT / "train.py"), *arguments],
                env=environment() | ({} if shares_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
                cwd=self.home,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def workers(self) -> list[int]:
        """The ids of the agent's processes that train."""
        while True:
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
            pids = [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
            if len(pids) == self.processes:
                return pids
            time.sleep(0.1)

    def kill(self) -> None:
        """End the agent and its processes as a power cut does."""
        for pid in (self.agent.pid, *self.workers()):
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def wait(self) -> int:
        return self.agent.wait(timeout=PATIENCE_S)

    def text(self) -> str:
        return self.log.read_text()

    def end(self) -> str:
        return self.text()[-1500:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_all_end_well(nodes: list[Node]) -> None:
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].end() + nodes[1].end()


def wait_for_step(out_dir: Path, step: int) -> None:
    """Wait until the run has a checkpoint of at least this step."""
    deadline = time.monotonic() + PATIENCE_S
    while max(steps(out_dir), default=0) < step:
        assert time.monotonic() < deadline, f"{out_dir} has no checkpoint {step}"
        time.sleep(0.02)


def start_both(home: Path, arguments: list[str], **keys: Any) -> list[Node]:
    port = free_port()
    first = Node(home, 0, port, arguments, **keys)
    time.sleep(1.0)  # so that it serves the rendezvous
    return [first, Node(home, 1, port, arguments, **keys)]


def lose_a_node(home: Path, out_dir: Path, arguments: list[str], processes: int = 1) -> int:
    """Kill an agent with its processes and start it again, in a run that then ends well; returns its resumes."""
    nodes = start_both(home, arguments, restarts=3, processes=processes)
    wait_for_step(out_dir, 100)
    nodes[1].kill()
    nodes[1] = Node(home, 1, nodes[0].port, arguments, restarts=3, processes=processes)
    assert_all_end_well(nodes)
    return count_resumes(nodes)


def count_resumes(nodes: list[Node]) -> int:
    """Either node may have rank 0, which alone prints."""
    return sum(len(re.findall(r"^resuming ", node.text(), flags=re.MULTILINE)) for node in nodes)


def assert_same_run(undisturbed: Path, out_dir: Path) -> None:
    assert_same_checkpoint(undisturbed, out_dir, STEPS)
    assert metrics(out_dir) == metrics(undisturbed)


# --- Scenarios; each returns what it saw


def train(home: Path) -> str:
    nodes = start_both(home, flags(**KEYS, out_dir=home / "undisturbed", keep_every=50))
    assert_all_end_well(nodes)
    alone = [sys.executable, str(ROOT / "train.py"), *flags(**KEYS, out_dir=home / "alone")]
    subprocess.run(alone, env=environment(), cwd=home, check=True, stdout=subprocess.DEVNULL)
    (two,), (one,) = (metrics(home / name, "val_loss")[-1] for name in ("undisturbed", "alone"))
    assert abs(two - one) < 1e-2, (two, one)  # dropout's noise differs
    return f"{STEPS} steps on two nodes: validation loss {two:.4f}; one process {one:.4f}"


def resume(home: Path) -> str:
    out_dir = home / "resumed"
    for last in (STEPS // 2, STEPS):
        arguments = flags(**KEYS | {"max_iters": last}, out_dir=out_dir, resume="auto")
        nodes = start_both(home, arguments)
        assert_all_end_well(nodes)
    assert_same_checkpoint(home / "undisturbed", out_dir, STEPS)
    return f"resumed at {STEPS // 2}: the same bits as undisturbed"


def worker(home: Path) -> str:
    for shares_store in (False, True):
        out_dir = home / f"worker-{shares_store}"
        nodes = start_both(home, flags(**KEYS, out_dir=out_dir, resume="auto"), restarts=9, shares_store=shares_store)
        for step in (100, 200):
            wait_for_step(out_dir, step)
            os.kill(nodes[1].workers()[0], signal.SIGKILL)
            wait_for_step(out_dir, step + 50)
        assert_all_end_well(nodes)
        assert_same_run(home / "undisturbed", out_dir)
    resumes = count_resumes(nodes)
    return f"SIGKILL of a process, twice, with and without a shared store: {resumes} resumes, the same bits"


def agent(home: Path) -> str:
    resumes = lose_a_node(home, home / "agent", flags(**KEYS, out_dir=home / "agent", resume="auto"))
    assert_same_run(home / "undisturbed", home / "agent")
    return f"SIGKILL of an agent and its process, started again: {resumes} resume(s), the same bits"


def elastic(home: Path) -> str:
    arguments = flags(**KEYS, out_dir=home / "elastic", resume="auto")
    nodes = start_both(home, arguments, nnodes="1:2", restarts=3)
    wait_for_step(home / "elastic", 100)
    nodes[1].kill()
    assert nodes[0].wait() == 0, nodes[0].end()
    assert "processes: 2 -> 1" in nodes[0].text()
    lines = {step: tokens for step, tokens, _ in metrics(home / "elastic", "step", "tokens", "loss")}
    assert lines == {step: tokens for step, tokens, _ in metrics(home / "undisturbed", "step", "tokens", "loss")}
    (ours,), (theirs,) = (metrics(home / name, "val_loss")[-1] for name in ("elastic", "undisturbed"))
    assert abs(ours - theirs) < 1e-2, (ours, theirs)
    return f"one node fewer (--nnodes=1:2): from 2 processes to 1, equal rows, loss {ours:.4f} after {theirs:.4f}"


def sharded(home: Path) -> str:
    """Two nodes of two processes: all four share a copy of the model, or those of each node do."""
    resumes = 0
    for shards in (4, 2):
        keys = KEYS | {"gradient_accumulation_steps": 4, "shards": shards}
        undisturbed, out_dir = (home / f"{name}-{shards}" for name in ("undisturbed", "sharded"))
        nodes = start_both(home, flags(**keys, out_dir=undisturbed, keep_every=50), processes=2)
        assert_all_end_well(nodes)
        resumes += lose_a_node(home, out_dir, flags(**keys, out_dir=out_dir, resume="auto"), processes=2)
        assert_same_run(undisturbed, out_dir)
        for node in nodes:
            node.log.unlink()
    return f"--shards=4, and 2, on two nodes of two processes, one of which is killed: {resumes} resumes, the same bits"


def indivisible(home: Path) -> str:
    arguments = flags(**KEYS | {"batch_size": 3, "gradient_accumulation_steps": 1}, out_dir=home / "indivisible")
    nodes = start_both(home, arguments)
    assert 0 not in [node.wait() for node in nodes]
    assert "error: batch_size × gradient_accumulation_steps = 3 rows per step are not divisible" in nodes[0].text()
    assert not (home / "indivisible").exists()
    return "3 rows per step on two nodes: refused in one line"


def unshared(home: Path) -> str:
    start = time.monotonic()
    nodes = start_both(home, flags(**KEYS, out_dir="out", timeout_s=600))
    assert 0 not in [node.wait() for node in nodes]
    seconds = time.monotonic() - start
    for node in nodes:
        (line,) = re.findall(r"^error.*is not the directory that .* writes into.*$", node.text(), flags=re.MULTILINE)
    assert "exitcode  : 2" in nodes[0].text(), nodes[0].end()
    assert not (home / "node0/out").exists()  # no trace of it
    return f"out_dir not shared: both nodes end after {seconds:.0f} s with status 2: {line}"


def relative(home: Path) -> str:
    """A relative out_dir in one directory is shared."""
    port = free_port()
    arguments = flags(**KEYS | {"max_iters": 10}, out_dir="out")
    shutil.rmtree(home / "node1", ignore_errors=True)
    (home / "node1").symlink_to(home / "node0")
    nodes = [Node(home, number, port, arguments) for number in (0, 1)]
    assert_all_end_well(nodes)
    return "a relative out_dir, from the same directory: trains"


def hang(home: Path) -> str:
    nodes = start_both(home, flags(**KEYS, out_dir=home / "hang", timeout_s=5))
    wait_for_step(home / "hang", 50)
    os.kill(nodes[1].workers()[0], signal.SIGSTOP)
    start = time.monotonic()
    while "did not answer" not in nodes[0].text():
        assert time.monotonic() - start < PATIENCE_S, nodes[0].end()
        time.sleep(0.1)
    seconds = time.monotonic() - start
    os.kill(nodes[1].workers()[0], signal.SIGKILL)
    assert 0 not in [node.wait() for node in nodes]
    (line,) = re.findall(r"^error.*did not answer.*$", nodes[0].text(), flags=re.MULTILINE)
    return f"SIGSTOP of a process with --timeout_s=5: named after {seconds:.0f} s: {line}"


SCENARIOS: list[Callable[[Path], str]] = [
    *(train, resume, worker, agent, elastic, sharded, indivisible, unshared, relative, hang),
]


def main() -> None:
    names = sys.argv[1:]
    home = Path(tempfile.mkdtemp(prefix="nodes-"))
    write_letters(home / "letters", Source(1))
    for scenario in SCENARIOS:
        if scenario is train or not names or scenario.__name__ in names:
            start = time.monotonic()
            for log in home.glob("*.log"):
                log.unlink()
            try:
                line = scenario(home)
            except BaseException:
                print(f"{scenario.__name__} failed; {home} is left for inspection", file=sys.stderr)
                raise
            print(f"{scenario.__name__} ({time.monotonic() - start:.0f} s): {line}", flush=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
