"""Kill a small run again and again, resume it with --resume=auto, and compare its end with an undisturbed run's.

    python tests/chaos/chaos.py --kills=110 --pair_kills=5 --sharded_kills=60 --seed=1

kills: one process, SIGKILL at random times and in random file operations, most of them of a save. pair_kills: two gloo
processes under torchrun, of which one gets SIGKILL. sharded_kills: the same of four that share one copy of the model,
or two; every other kill goes through PHASES, on each rank in turn. Prints a line for each kill. Ends at the first
difference with status 1 and the reason, and leaves its folder for inspection. Needs Linux.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from conftest import ROOT, environment, flags, metrics, torchrun
from small_data import LETTERS, Source, write_letters

import load
import train
from model import GPT
from nanogpt import checkpoint
from nanogpt.checkpoint import Checkpoint
from nanogpt.errors import run_script
from nanogpt.files import recover_directories
from nanogpt.metrics import MetricsWriter
from nanogpt.optim import Optimizer
from nanogpt.schedule import StepSchedule
from nanogpt.sharding import MapExchange

EVERY = 4  # steps between saves
STEPS = 32
KILLS_PER_RUN = 9
POWER_CUTS = 0.3  # share of the kills of one process after which unsynced data is lost too
BASE = {"n_layer": 2, "gradient_accumulation_steps": 2, "row_order": "epoch", "eval_interval": EVERY}
GPT2 = BASE | {"dropout": 0.2, "lr_decay_iters": ..., "max_iters": STEPS}
MODERN = GPT2 | {"arch": "modern", "bias": False, "n_kv_head": 1, "tied": False, "optimizer": "muon", "skip_spikes": 3}
FOUR = {"gradient_accumulation_steps": 4, "batch_size": 2}
SHARDED = {"fsdp": GPT2 | FOUR | {"shards": 4}, "hsdp": MODERN | FOUR | {"shards": 2}}
# A GPT-2 of transformers, with which a resumed run must not start again.
PRETRAINED = GPT2 | {"init_from": "pretrained", "optimizer": "muon", "skip_spikes": 3}

# Operations in which a process can be killed: owner of the function, which argument is the path, calls in two saves.
OPERATIONS: dict[str, tuple[Any, int, int]] = {
    "mkdir": (os, 0, 4),
    "save_file": (safetensors.torch, 1, 4),
    "write_text": (Path, 0, 6),
    "fsync": (os, 0, 16),
    "rename": (os, 0, 2),
    "rmtree": (shutil, 0, 6),
    "log": (MetricsWriter, 0, 2 * EVERY),  # not of a save: a line of metrics.jsonl
}

# Functions before or after which any rank can be killed: owner, calls in two saves.
PHASES: dict[str, tuple[Any, int]] = {
    "copy_rows": (load, 20),  # building the model
    "forward": (GPT, 10),
    "backward": (torch.Tensor, 8),
    "step": (Optimizer, 8),
    "apply": (MapExchange, 8),  # Muon's exchange of rows
    "evaluate": (train, 4),
    "gather_rows": (checkpoint, 150),
}


class Kill(NamedTuple):
    """SIGKILL in the `nth` operation `name`, after `share` of it; in a phase before it, or after it from 0.5.

    "line": from outside, share × 50 ms after the `nth` line of the journal. "stop": SIGTERM at step `nth`.
    """

    name: str
    nth: int
    share: float
    rank: int = 0


# A step that is saved twice, because SIGTERM came before its evaluation: the old checkpoint gives way to the new one.
SECOND_SAVES = [Kill("rename", 1, 1), Kill("rename", 2, 0), Kill("rename", 2, 1), Kill("rmtree", 3, 0.5)]


class Mismatch(Exception):
    """A killed run left, or ended with, something else than the undisturbed run."""


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise Mismatch(problem)


# --- In the process that is killed


def instrument(journal: Path, kill: Kill | None) -> None:
    """Make this process, which will run train.py's main, report to `journal`, and kill itself as `kill` says."""
    handle = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    rank = int(os.environ.get("RANK", 0))
    local = threading.local()
    left = kill.nth if kill and kill.rank == rank else 0

    def report(*words: object) -> None:  # unbuffered, so that it survives the kill
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())

    def die(moment: str, name: str, path: Path) -> None:
        report("fatal", moment, name, "of", path.name)
        os.kill(os.getpid(), signal.SIGKILL)

    def instrument_operation(owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        def operation(*args: Any, **keys: Any) -> Any:
            nonlocal left
            is_counted = name == "log" or getattr(local, "saving", False)
            if not is_counted and name != "fsync":
                return original(*args, **keys)
            share = -1.0  # of this operation, after which the process dies; below 0: it lives
            if kill and is_counted and kill.name == name:
                left -= 1
                share = kill.share if left == 0 else -1.0
            path = args[place].path if name == "log" else Path(str(args[place]))
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))

            if share == 0:
                die("before", name, path)
            if 0 < share < 1 and name == "rmtree" and path.exists():
                files = sorted(path.iterdir())
                for file in files[: math.ceil(share * len(files))]:
                    file.unlink()
                die("amid", name, path)
            size = path.stat().st_size if name == "log" else 0
            result = original(*args, **keys)
            if name == "fsync":
                status = os.fstat(args[0])
                report("synced", status.st_ino, status.st_size)
            elif path.is_file():
                if name != "log":  # which appends to what was synced
                    report("written", path.stat().st_ino)
                if 0 < share < 1:  # a kill amid a write leaves the beginning
                    os.truncate(path, size + int(share * (path.stat().st_size - size)))
                    die("amid", name, path)
            elif name == "rename" and re.fullmatch(r"step-\d+", Path(args[1]).name):
                report("finished", int(Path(args[1]).name[5:]))
            if share >= 0:
                die("after", name, path)
            return result

        setattr(owner, name, operation)

    def instrument_phase(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def phase(*args: Any, **keys: Any) -> Any:
            nonlocal left
            left -= bool(kill and kill.name == name)
            share = kill.share if kill and kill.name == name and left == 0 else -1.0
            if 0 <= share < 0.5:
                die("before", name, Path(f"rank {rank}"))
            result = original(*args, **keys)
            if share >= 0.5:
                die("after", name, Path(f"rank {rank}"))
            return result

        setattr(owner, name, phase)

    save_and_prune, lr_scale = checkpoint.Writer._write, StepSchedule.lr_scale

    def watched_save(*args: Any) -> None:
        if rank:
            save_and_prune(*args)  # sends its shards
            return
        local.saving = True
        report("phase", "in a save")
        save_and_prune(*args)
        report("phase", "between saves")

    def watched_lr_scale(schedule: StepSchedule, step: int) -> float:
        if rank == 0:
            report("step", step)
        if kill and kill.name == "stop" and step == kill.nth:
            signal.raise_signal(signal.SIGTERM)
        return lr_scale(schedule, step)

    for name, (owner, place, _) in OPERATIONS.items():
        instrument_operation(owner, name, place)
    for name, (owner, _) in PHASES.items():
        instrument_phase(owner, name)
    checkpoint.Writer._write = watched_save  # type: ignore[method-assign]
    StepSchedule.lr_scale = watched_lr_scale  # type: ignore[method-assign]
    report("born", rank, os.getpid())


def work(journal: Path, kill: Kill | None, arguments: list[str]) -> None:
    instrument(journal, kill)
    sys.argv = ["train.py", *arguments]
    run_script(train.main)


def fork(function: Callable[[], None], log: Path) -> int:
    """Call a function in a child process, whose output goes to `log`; returns the child's id.

    Forked, because starting Python takes three seconds for the import of torch. This process has one thread and
    computes nothing, so the child finds torch as if it had imported it; the undisturbed run is `python train.py`.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --- In the process that watches


class Witness:
    """Starts and follows a run, and compares it with `reference`, an undisturbed run that kept all its checkpoints."""

    def __init__(self, home: Path, name: str, processes: int, keys: dict[str, Any], reference: Path):
        self.out_dir = home / name
        self.reference = reference
        self.processes = processes
        self.arguments = flags(**keys, out_dir=self.out_dir, resume="auto")
        self.log = home / f"{name}.log"
        self.journal = home / f"{name}.journal"
        self.finished = 0  # step of the newest checkpoint that had its name
        self.synced: dict[int, int] = {}  # bytes of each file, by inode, that survive a power cut

    def run(self, kill: Kill | None) -> int | None:
        """Start the run and wait for its end; returns its status, None where it was killed."""
        self.journal.write_text("")
        self.fatal = ""
        if self.processes == 1:
            child = fork(partial(work, self.journal, kill, self.arguments), self.log)
        else:
            worker = [__file__, "--worker", str(self.journal), json.dumps(kill), *self.arguments]
            with self.log.open("a") as file:
                command = [*torchrun(self.processes), *worker]
                child = subprocess.Popen(command, env=environment(), stdout=file, stderr=file).pid
        ended = 0
        while not ended:
            time.sleep(0.001)
            if kill and kill.name == "line" and not self.fatal:
                self._kill_from_outside(kill)
            ended, code = os.waitpid(child, os.WNOHANG)
        self._read_journal()
        status = os.waitstatus_to_exitcode(code)
        was_killed = bool(self.fatal) and status != 0
        was_stopped = kill is not None and kill.name == "stop" and status == 143
        require(was_killed or was_stopped or status == 0, f"status {status}:\n{self.log.read_text()[-2000:]}")
        return None if was_killed else status

    def _kill_from_outside(self, kill: Kill) -> None:
        """Before the process is reaped, so that its id is still its own."""
        lines = self.journal.read_text().splitlines()
        pids = {words[1]: int(words[2]) for words in map(str.split, lines) if words[0] == "born"}
        if len(lines) >= kill.nth and str(kill.rank) in pids:
            time.sleep(0.05 * kill.share)
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(pids[str(kill.rank)], signal.SIGKILL)
            self.fatal = "at a random time"

    def _read_journal(self) -> None:
        self.phase = "at the start"
        for line in self.journal.read_text().splitlines():
            word, _, rest = line.partition(" ")
            if word == "fatal":
                self.fatal = rest
            elif word in ("phase", "step"):
                self.phase = rest if word == "phase" else self.phase
            elif word == "finished":
                self.finished = int(rest)
            elif word == "written":
                self.synced.pop(int(rest), None)
            elif word == "synced":
                inode, size = map(int, rest.split())
                self.synced[inode] = size

    def cut_power(self, random: Random) -> None:
        """Take from each file some of what was written to it after its last fsync."""
        for path in self.out_dir.rglob("*"):
            if path.is_file():
                status = path.stat()
                synced = min(self.synced.get(status.st_ino, 0), status.st_size)
                os.truncate(path, random.randint(synced, status.st_size))

    def check(self) -> int:
        """The step that the next start resumes from.

        Raises Mismatch where that checkpoint is older than the newest finished one, or differs from the undisturbed
        run's in a bit.
        """
        copy, output = self.out_dir.with_name("copy"), io.StringIO()  # a copy, because this repairs
        shutil.rmtree(copy, ignore_errors=True)
        if self.out_dir.exists():
            shutil.copytree(self.out_dir, copy)
            recover_directories(copy / "ckpt")
        with contextlib.redirect_stdout(output):
            resumed = checkpoint.load_latest(copy, "auto")
        require(not output.getvalue(), output.getvalue())  # it names damaged checkpoints
        step = resumed.state["step"] if resumed else 0
        require(step >= self.finished, f"the newest intact checkpoint is {step}, but {self.finished} was finished")
        if resumed:
            compare(resumed, checkpoint.load(self.reference / "ckpt" / resumed.path.name), "step", "samples", "guard")
        return step

    def check_end(self) -> None:
        """Raises Mismatch unless metrics.jsonl, the checkpoints and the files are those of the undisturbed run."""
        for n, (ours, theirs) in enumerate(itertools.zip_longest(metrics(self.out_dir), metrics(self.reference)), 1):
            require(ours == theirs, f"line {n} of metrics.jsonl: {ours}; undisturbed: {theirs}")
        paths = checkpoint.list_checkpoints(self.reference)
        kept = {path.name for path in (*paths[:2], checkpoint.best(paths)) if path}
        names = {path.name for path in (self.out_dir / "ckpt").iterdir()}
        require(names == kept, f"ckpt holds {sorted(names)}; undisturbed: {sorted(kept)}")
        for name in kept:
            a, b = (checkpoint.load(out_dir / "ckpt" / name) for out_dir in (self.out_dir, self.reference))
            compare(a, b, *(a.state.keys() | b.state.keys()) - {"time_s", "config"})
        for archive in self.out_dir.parent.glob(f"{self.out_dir.name}.[0-9]*"):
            require(not checkpoint.list_checkpoints(archive), f"{archive}: a run with checkpoints was archived")


def compare(ours: Checkpoint, theirs: Checkpoint, *keys: str) -> None:
    """Raises Mismatch unless weights, optimizer and these keys of the state are equal to the bit."""
    for mine, other in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        different = mine.keys() ^ other.keys()
        different |= {name for name in mine.keys() & other.keys() if not torch.equal(mine[name], other[name])}
        require(not different, f"{ours.path} differs from the undisturbed run in {', '.join(sorted(different)[:3])}")
    for key in sorted(keys):
        a, b = ours.state.get(key), theirs.state.get(key)
        require(a == b, f"{ours.path}: {key} is {a}; undisturbed: {b}")


def draw_kill(random: Random, processes: int, done: int) -> Kill:
    """Half of them in an operation of a save, which only rank 0 makes; a quarter at any time; the others in a log.

    Of four processes every other kill is in a phase of a rank, in turn.
    """
    if processes > 2 and done % 2 == 0:
        rank, number = divmod(done // 2 % (processes * len(PHASES)), len(PHASES))
        name, (_, calls) = [*PHASES.items()][number]
        return Kill(name, random.randint(1, calls), random.random(), rank)
    amid = random.random()
    name = random.choice(["line", "log", *random.sample([name for name in OPERATIONS if name != "log"], 2)])
    if name == "line":
        return Kill("line", random.randint(1, 60), random.random(), random.randrange(processes))
    return Kill(name, random.randint(1, OPERATIONS[name][2]), random.choice([0, amid, amid, 1]))


def trial(processes: int, recipes: dict[str, dict[str, Any]], kills: int, random: Random, home: Path) -> str:
    """Runs with up to KILLS_PER_RUN kills each. Of one process, every sixth kill hits a second save of a step."""
    launcher = torchrun(processes) if processes > 1 else [sys.executable]
    for name, recipe in recipes.items():
        arguments = flags(**recipe, dataset=home / "letters", out_dir=home / name, keep_every=EVERY)
        command = [*launcher, str(ROOT / "train.py"), *arguments]
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    done = saves = cuts = runs = 0
    while done < kills:
        name = [*recipes][runs % len(recipes)]
        keys = recipes[name] | {"dataset": home / "letters"}
        witness = Witness(home, f"{name}-{runs}", processes, keys, home / name)
        last = min(kills, done + min(KILLS_PER_RUN, math.ceil(kills / len(recipes))))
        status, step = None, 0
        while status != 0:
            kill: Kill | None = draw_kill(random, processes, done)
            if status == 143:
                kill = random.choice(SECOND_SAVES)
            elif done == last:
                kill = None
            elif processes == 1 and done % 6 == 3 and step + EVERY < STEPS:
                kill = Kill("stop", step + EVERY - 2, 0)  # the signal ends the run at the step after the next
            status = witness.run(kill)
            if status is None:
                done += 1
                saves += witness.phase == "in a save"
                line = f"kill {done}: {name}, {witness.phase}, {witness.fatal}"
                if processes == 1 and random.random() < POWER_CUTS:
                    cuts += 1
                    witness.cut_power(random)
                    line += ", with a power cut"
                step = witness.check()
                print(f"{line}; resumes at {step}", flush=True)
            elif status:
                before, step = step, witness.check()
                require(step == before + EVERY, f"SIGTERM ended the run at {step}, not {before + EVERY}")
        witness.check_end()
        runs += 1
    summary = f"{done} kills of {processes} process(es), {saves} in a save, {cuts} with a power cut"
    return f"{summary}; {runs} of {runs} runs ended as undisturbed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 50), ("pair_kills", 5), ("sharded_kills", 5), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    start = time.monotonic()
    write_letters(home / "letters", Source(args.seed), train=2_000, val=500)  # an epoch ends after 15 steps
    if args.pair_kills:
        from random_models import build_gpt2  # here, for it takes five seconds

        build_gpt2(n_embd=16, n_positions=32, vocab_size=len(LETTERS)).save_pretrained(home / "pretrained")
    pretrained = PRETRAINED | {"init_from": home / "pretrained"}
    torch.set_num_threads(1)
    try:
        for processes, recipes, kills in (
            (1, {"gpt2": GPT2, "modern": MODERN}, args.kills),
            (2, {"pair": pretrained}, args.pair_kills),
            (4, SHARDED, args.sharded_kills),
        ):
            if kills:
                summary = trial(processes, recipes, kills, Random(args.seed), home)
                print(f"{summary} ({time.monotonic() - start:.0f} s)", flush=True)
    except Mismatch as problem:
        sys.exit(f"MISMATCH: {problem}\n{home} is left for inspection")
    shutil.rmtree(home)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        planned = json.loads(sys.argv[3])
        work(Path(sys.argv[2]), Kill(*planned) if planned else None, sys.argv[4:])
    else:
        main()
