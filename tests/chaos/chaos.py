"""Kill a small run again and again, restart it with --resume=auto, and compare its end with an undisturbed run's.

    python tests/chaos.py --kills=110 --pair_kills=5 --changes=2 --seed=1

Three trials, each left out by a 0. kills: one process, SIGKILL at random instants and at random operations on files,
most of them of a save. pair_kills: two gloo processes under torchrun, of which one gets SIGKILL. changes: SIGTERM, then
another number of processes (2, 1, 2, …). Prints a line for each kill; at the first difference it ends with status 1,
the reason, and its folder left for a look. Needs Linux.
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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as when train.py itself is run

import safetensors.torch
import torch
import transformers
from conftest import LETTERS, ROOT, Source, environment, flags, metrics

import train
from nanogpt import checkpoint
from nanogpt.checkpoint import Checkpoint
from nanogpt.data.rows import Rows
from nanogpt.data.write import write_dataset
from nanogpt.errors import run_script
from nanogpt.metrics import MetricsWriter
from nanogpt.text.tokenizer import Tokenizer

EVERY, STEPS = 4, 32  # steps from save to save, and of a run of one process
KILLS_A_RUN = 9  # after which a run is let go to its end, and another begins
POWER_CUTS = 0.3  # share of the kills of one process after which what was not synced is lost too
BASE = {"n_layer": 2, "gradient_accumulation_steps": 2, "row_order": "epoch", "eval_interval": EVERY}
GPT2 = BASE | {"dropout": 0.2, "lr_decay_iters": ...}
MODERN = GPT2 | {"arch": "modern", "bias": False, "n_kv_head": 1, "tied": False, "optimizer": "muon", "skip_spikes": 3}

# Where a process can be made to die: whose function it is, which argument is the path, how many come in two saves.
OPERATIONS: dict[str, tuple[Any, int, int]] = {
    "mkdir": (os, 0, 2),
    "save_file": (safetensors.torch, 1, 4),
    "write_text": (Path, 0, 6),
    "fsync": (os, 0, 14),
    "rename": (os, 0, 2),
    "rmtree": (shutil, 0, 5),
    "log": (MetricsWriter, 0, 2 * EVERY),  # not of a save: a line of metrics.jsonl
}
# A step saved twice, because a SIGTERM came before its evaluation: the old checkpoint makes way for the new one.
TWICE = [("rename", 1, 1.0), ("rename", 2, 0.0), ("rename", 2, 1.0), ("rmtree", 2, 0.5)]


class Doom(NamedTuple):
    """A death from within: in the `nth` operation `name`, of which `share` was done. "stop" stands for a SIGTERM
    at step `nth`."""

    name: str
    nth: int
    share: float


class Blow(NamedTuple):
    """A death from without: `delay_s` after the `nth` line of the journal that begins with `word`."""

    word: str
    nth: int
    delay_s: float


class Mismatch(Exception):
    """What a killed run left, or where it ended, is not as it must be."""


def demand(holds: bool, why: str) -> None:
    if not holds:
        raise Mismatch(why)


# ---- in the process that is to die


def watch(journal: Path, doom: Doom | None) -> None:
    """Have this process, which will run train.py's main, tell `journal` what it does, and die of `doom`."""
    handle, is_main = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT), os.environ.get("RANK", "0") == "0"
    here, left, last_step = threading.local(), doom.nth if doom else 0, -1

    def tell(*words: object) -> None:  # at once: what was told survives the teller
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())

    def die(when: str, name: str, path: Path) -> None:
        tell("fatal", when, name, "of", path.name)
        os.kill(os.getpid(), signal.SIGKILL)

    def observe(owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        def operation(*args: Any, **keys: Any) -> Any:
            nonlocal left
            counts = name == "log" or getattr(here, "saving", False)
            if not (counts or name == "fsync"):
                return original(*args, **keys)
            where = {"log": lambda of: of.path, "fsync": lambda of: os.readlink(f"/proc/self/fd/{of}")}
            path = Path(where.get(name, str)(args[place]))
            share = None  # of this operation, after which the process dies; None: it lives on
            if doom and counts and doom.name == name:
                left -= 1
                share = doom.share if left == 0 else None
            if share == 0:
                die("before", name, path)
            if share not in (None, 1) and name == "rmtree" and path.exists():
                files = sorted(path.iterdir())
                for file in files[: math.ceil(share * len(files))]:
                    file.unlink()
                die("amid", name, path)
            size = path.stat().st_size if name == "log" else 0
            result = original(*args, **keys)
            if name == "fsync":
                found = os.fstat(args[0])
                tell("synced", found.st_ino, found.st_size)
            elif path.is_file():
                if name != "log":  # which adds to what was synced
                    tell("written", path.stat().st_ino)
                if share not in (None, 1):  # a kill amid a write leaves the beginning
                    os.truncate(path, size + int(share * (path.stat().st_size - size)))
                    die("amid", name, path)
            elif name == "rename" and re.fullmatch(r"step-\d+", Path(args[1]).name):
                tell("finished", int(Path(args[1]).name[5:]))
            if share is not None:
                die("after", name, path)
            return result

        setattr(owner, name, operation)

    def bracket(name: str) -> None:
        original = getattr(checkpoint, name)

        def inside(*args: Any) -> Any:
            here.saving = True
            tell("enter", name)
            try:
                return original(*args)
            finally:
                tell("leave", name)
                here.saving = False

        setattr(checkpoint, name, inside)

    rate, read, to_resume = train.TrainConfig.learning_rate_at, Rows.__getitem__, checkpoint.load_latest

    def learning_rate_at(config: train.TrainConfig, step: int) -> float:
        nonlocal last_step
        if step > last_step:  # the log asks again, for steps that are over
            last_step = step
            if is_main:
                tell("step", step)
            if doom and doom.name == "stop" and step == doom.nth:
                signal.raise_signal(signal.SIGTERM)
        return rate(config, step)

    def getitem(rows: Rows, span: slice) -> Any:
        tell("rows", last_step, span.start, span.stop)
        return read(rows, span)

    def find_start(*args: Any) -> Checkpoint | None:
        found = to_resume(*args)
        tell("resumed", found.state["step"] if found else 0)
        return found

    for name, (owner, place, _) in OPERATIONS.items():
        observe(owner, name, place)
    bracket("save")
    bracket("prune")
    for owner, name, spy in (
        (train.TrainConfig, "learning_rate_at", learning_rate_at),
        (Rows, "__getitem__", getitem),
        (checkpoint, "load_latest", find_start),
    ):
        setattr(owner, name, spy)
    tell("born", os.environ.get("RANK", 0), os.getpid())


def fork(journal: Path, doom: Doom | None, arguments: list[str], log: Path) -> int:
    """train.py with these arguments in a child of this process; returns its id.

    Forked, because each start of a Python spends three seconds importing torch, a fork none: fifty kills take a minute.
    The child is a process as any other, and SIGKILL as sudden to it. This process has one thread and computes nothing,
    so the child finds torch as if it had imported it itself; the undisturbed run beside it is `python train.py`.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["train.py", *arguments]
        watch(journal, doom)
        run_script(train.main)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def work(journal: Path, dooms: list[list[Any] | None], arguments: list[str]) -> None:
    """train.py with these arguments as one of several processes. The first dies of `dooms`, one a life."""
    life, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("RANK", 0))
    doom = dooms[life] if rank == 0 and life < len(dooms) else None
    watch(journal, Doom(*doom) if doom else None)
    while not go_ahead(journal, life).exists():  # the life before this one is being looked at
        time.sleep(0.01)
    sys.argv = ["train.py", *arguments]
    run_script(train.main)


def go_ahead(journal: Path, life: int) -> Path:
    return journal.with_name(f"{journal.name}.go-{life}")


# ---- who watches it


class Witness:
    """Follows one run through its lives and compares it with the undisturbed one in `reference`, which kept all of its
    checkpoints.

    finished: step of the newest checkpoint that had got its name. synced: bytes of each file, by its inode, that a
    power cut would leave. rows: (step, row) of each row read.
    """

    def __init__(self, home: Path, name: str, reference: Path | None = None):
        self.out_dir, self.reference = home / name, reference
        self.journal, self.log = home / f"{name}.journal", home / f"{name}.log"
        self.journal.touch()
        go_ahead(self.journal, 0).touch()
        self.file, self.rest = self.journal.open(), ""
        self.finished, self.synced, self.rows = 0, dict[int, int](), list[tuple[int, int]]()
        self.pids: dict[int, int] = {}  # by rank
        self.begin()

    def begin(self) -> None:
        """A life begins."""
        self.heard, self.step, self.inside, self.fatal = Counter[str](), -1, "", ""

    def listen(self, blow: Blow | None = None, victim: int = 0) -> Iterator[str]:
        """The first word of each line that has come to the journal since the last time. Strikes the victim, a rank."""
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in lines:
            word, *texts = line.split()
            if word == "fatal":
                self.fatal = " ".join(texts)
            elif word in ("enter", "leave"):
                self.inside = texts[0] if word == "enter" else ""
            else:
                numbers = [int(text) for text in texts]
                match word:
                    case "born":
                        self.pids[numbers[0]] = numbers[1]
                    case "step":
                        self.step = numbers[0]
                    case "resumed":
                        demand(
                            numbers[0] >= self.finished, f"resumed at {numbers[0]}, but {self.finished} was finished"
                        )
                    case "finished":
                        self.finished = numbers[0]
                    case "written":
                        self.synced.pop(numbers[0], None)
                    case "synced":
                        self.synced[numbers[0]] = numbers[1]
                    case "rows":
                        self.rows += [(numbers[0], row) for row in range(*numbers[1:])]
            self.heard[word] += 1
            if blow and word == blow.word and self.heard[word] == blow.nth:
                time.sleep(blow.delay_s)
                os.kill(self.pids[victim], signal.SIGKILL)
                self.fatal = "at an instant"
            yield word

    def where(self) -> str:
        """The moment of death, in words."""
        place = f"in {self.inside}, " if self.inside else f"at step {self.step}, " if self.step >= 0 else ""
        return place + self.fatal

    def cut_power(self, random: Random) -> None:
        """Take from each file some of what was written to it after its last fsync."""
        for path in self.out_dir.rglob("*"):
            if path.is_file():
                found = path.stat()
                os.truncate(path, random.randint(min(self.synced.get(found.st_ino, 0), found.st_size), found.st_size))

    def check(self) -> int:
        """The step that the next start goes on from. Raises Mismatch where that checkpoint is older than the newest
        that was finished, or not to the bit what the undisturbed run had at that step."""
        copy, told = self.out_dir.with_name("copy"), io.StringIO()  # a copy, because `to_resume` mends what it finds
        shutil.rmtree(copy, ignore_errors=True)
        if self.out_dir.exists():
            shutil.copytree(self.out_dir, copy)
        with contextlib.redirect_stdout(told):
            found = checkpoint.load_latest(copy, "auto")
        demand(not told.getvalue(), told.getvalue())  # it tells of damaged ones
        step = found.state["step"] if found else 0
        demand(step >= self.finished, f"the newest whole checkpoint is {step}, but {self.finished} was finished")
        if found and self.reference:
            compare(found, checkpoint.load(self.reference / "ckpt" / found.path.name), "step", "samples", "guard")
        return step

    def check_end(self) -> None:
        """Raises Mismatch unless the run ended as the undisturbed one: each line of metrics.jsonl, each checkpoint that
        a run keeps, and nothing else left."""
        assert self.reference
        for n, (ours, theirs) in enumerate(itertools.zip_longest(metrics(self.out_dir), metrics(self.reference)), 1):
            demand(ours == theirs, f"line {n} of metrics.jsonl: {ours}; undisturbed: {theirs}")
        whole = checkpoint.list_checkpoints(self.reference)
        kept = {path.name for path in (*whole[:2], checkpoint.best(whole)) if path}
        names = {path.name for path in (self.out_dir / "ckpt").iterdir()}
        demand(names == kept, f"ckpt holds {sorted(names)}; undisturbed: {sorted(kept)}")
        for name in kept:
            a, b = (checkpoint.load(out_dir / "ckpt" / name) for out_dir in (self.out_dir, self.reference))
            compare(a, b, *(a.state.keys() | b.state.keys()) - {"time_s", "config"})
        for moved in self.out_dir.parent.glob(f"{self.out_dir.name}.[0-9]*"):
            demand(not checkpoint.list_checkpoints(moved), f"{moved}: a run with checkpoints was moved aside")

    def told(self) -> str:
        """The end of what the run printed."""
        return "\n".join(self.log.read_text().splitlines()[-30:])


def compare(ours: Checkpoint, theirs: Checkpoint, *fields: str) -> None:
    """Raises Mismatch unless weights, optimizer and these fields of the state are equal, to the bit."""
    for mine, other in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        unlike = mine.keys() ^ other.keys()
        unlike |= {name for name in mine.keys() & other.keys() if not torch.equal(mine[name], other[name])}
        demand(not unlike, f"{ours.path} is not as undisturbed: {', '.join(sorted(unlike)[:3])}")
    for field in sorted(fields):
        a, b = ours.state.get(field), theirs.state.get(field)
        demand(a == b, f"{ours.path}: {field} is {a}; undisturbed: {b}")


# ---- the trials


def death(random: Random, in_save: bool) -> Doom | Blow:
    """How the next life ends."""
    name = random.choice([name for name in OPERATIONS if name != "log"]) if in_save else "log"
    amid = random.random()
    doom = Doom(name, random.randint(1, OPERATIONS[name][2]), random.choice([0, amid, amid, 1]))
    word, most, delay_s = random.choice(
        [("born", 1, 0.2), ("step", 2 * EVERY, 0.02), ("enter", 3, 0.01), ("log", 0, 0)]
    )
    return doom if in_save or word == "log" else Blow(word, random.randint(1, most), random.uniform(0, delay_s))


def one_life(witness: Witness, end: Doom | Blow | None, arguments: list[str]) -> int | None:
    """Start a run of one process and wait for its end; returns its status, None where it was killed."""
    witness.begin()
    doom, blow = end if isinstance(end, Doom) else None, end if isinstance(end, Blow) else None
    child = fork(witness.journal, doom, arguments, witness.log)
    ended = 0
    while not ended:
        time.sleep(0.001)
        for _ in witness.listen(blow):  # before it is waited for, so that its id is still its own
            pass
        ended, status = os.waitpid(child, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    for _ in witness.listen():
        pass
    stopped = doom is not None and doom.name == "stop" and code == 143
    demand(stopped or code in (0, -signal.SIGKILL), f"a start ended with status {code}:\n{witness.told()}")
    return None if code == -signal.SIGKILL else code


def alone(kills: int, random: Random, home: Path) -> str:
    """One process. Each sixth kill hits the second save of a step (TWICE)."""
    recipes, seen, runs = {"gpt2": GPT2, "modern": MODERN}, Counter[str](), 0
    keys = {"dataset": home / "letters", "max_iters": STEPS}
    for name, recipe in recipes.items():
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *flags(**recipe | keys, out_dir=home / name, keep_every=EVERY),
        ]
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    while seen["kills"] < kills:
        name = list(recipes)[runs % 2]
        runs += 1
        witness = Witness(home, f"{name}-{runs}", home / name)
        arguments = flags(**recipes[name] | keys, out_dir=witness.out_dir, resume="auto")
        last = min(kills, seen["kills"] + min(KILLS_A_RUN, math.ceil(kills / 2)))
        status, at = None, 0
        while status != 0:
            end: Doom | Blow | None = death(random, in_save=seen["kills"] % 2 == 1)
            if status == 143:
                end = Doom(*random.choice(TWICE))
            elif seen["kills"] == last:
                end = None
            elif seen["kills"] % 6 == 3 and at + EVERY < STEPS:
                end = Doom("stop", at + EVERY - 2, 0)  # the step that a signal ends is the one after the next
            status = one_life(witness, end, arguments)
            if status is None:
                seen.update({"kills": 1, "saves": witness.inside == "save"})
                told = f"kill {seen['kills']}: {name}, {witness.where()}"
                if random.random() < POWER_CUTS:
                    seen["cuts"] += 1
                    witness.cut_power(random)
                    told += ", the power cut too"
                at = witness.check()
                print(f"{told}; resumes at {at}", flush=True)
            elif status:
                before, at = at, witness.check()
                demand(at == before + EVERY, f"SIGTERM ended the run at {at}, not {before + EVERY}")
        witness.check_end()
    told = f"{seen['kills']} kills of one process, {seen['saves']} in a save, {seen['cuts']} with a power cut"
    return f"{told}; {runs} of {runs} runs ended as undisturbed"


def launch(size: int, witness: Witness, dooms: list[Doom | None], arguments: list[str]) -> subprocess.Popen:
    """`size` processes that do `work`, under torchrun where they are several, restarted as often as there are dooms."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={len(dooms)}"]
    worker = [__file__, "--worker", str(witness.journal), json.dumps(dooms), *arguments]
    command = [sys.executable, *(torchrun if size == 2 else []), *worker]
    # torchrun's own store outlives a restart, in which the new processes find the addresses of the dead ones: about a
    # restart in three then fails and costs another (github.com/pytorch/pytorch/issues/135712; still so in torch 2.13).
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with witness.log.open("a") as file:
        return subprocess.Popen(command, env=environment() | fresh_store, stdout=file, stderr=file)


def together(kills: int, random: Random, home: Path) -> str:
    """Two processes that begin with somebody's GPT-2, which a restart must not begin with again."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(LETTERS)}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special)).save_pretrained(home / "somebody")
    keys: dict[str, Any] = GPT2 | {"optimizer": "muon", "skip_spikes": 3, "dataset": home / "letters"}
    keys |= {"init_from": home / "somebody", "max_iters": EVERY * (3 * kills + 2)}
    whole = Witness(home, "pair")
    done = launch(2, whole, [], flags(**keys, out_dir=whole.out_dir, keep_every=EVERY)).wait()
    demand(done == 0, whole.told())

    ends = [death(random, in_save=n % 2 == 0) for n in range(kills)]
    ends = [end._replace(word="step") if isinstance(end, Blow) else end for end in ends]
    witness, life, victims = Witness(home, "pair-killed", whole.out_dir), 0, [n // 2 % 2 for n in range(kills)]
    dooms = [end if isinstance(end, Doom) else None for end in ends]
    process = launch(2, witness, dooms, flags(**keys, out_dir=witness.out_dir, resume="auto"))
    while process.poll() is None:
        time.sleep(0.001)
        blow = ends[life] if life < kills and not dooms[life] else None
        for word in witness.listen(blow, victims[life] if blow else 0):  # type: ignore[arg-type]
            if word == "born" and witness.heard["born"] == 4:  # both again
                life += 1
                demand(bool(witness.fatal), f"a start ended by itself:\n{witness.told()}")
                victim = f"of rank {victims[life - 1] if not dooms[life - 1] else 0}"
                print(f"kill {life}: {victim}, {witness.where()}; resumes at {witness.check()}", flush=True)
                witness.begin()
                witness.heard["born"] = 2
                go_ahead(witness.journal, life).touch()
    demand(process.returncode == 0, witness.told())
    demand(life == kills, f"{life} kills came, not {kills}:\n{witness.told()}")
    witness.check_end()
    return f"{kills} kills of one of two processes; the run ended as undisturbed"


def resized(changes: int, random: Random, home: Path) -> str:
    """One process, two, one: the same rows at each step, and losses that differ by the order of sums alone."""
    keys: dict[str, Any] = BASE | {"gradient_accumulation_steps": 4, "eval_interval": 20, "max_iters": 120}
    keys |= {"dataset": home / "letters"}
    one, witness = Witness(home, "one"), Witness(home, "resized")
    demand(launch(1, one, [], flags(**keys, out_dir=one.out_dir)).wait() == 0, one.told())
    for _ in one.listen():
        pass
    sizes = [2 - n % 2 for n in range(changes + 1)]
    for n, size in enumerate(sizes):
        process = launch(size, witness, [], flags(**keys, out_dir=witness.out_dir, resume="auto"))
        witness.begin()
        stop_after = random.randint(3, 15) if n < changes else 0
        while process.poll() is None:
            time.sleep(0.001)
            for word in witness.listen():
                if word == "step" and witness.heard[word] == stop_after:
                    process.send_signal(signal.SIGTERM)  # torchrun hands it on
        for _ in witness.listen():
            pass
        demand((process.returncode != 0) == (n < changes), f"status {process.returncode}:\n{witness.told()}")
        if n:
            told = f"processes: {sizes[n - 1]} -> {size}"
            demand(told in witness.log.read_text(), f"{told!r} was not said:\n{witness.told()}")
        print(
            f"{size} process(es), {f'SIGTERM at step {witness.check()}' if n < changes else 'to the end'}", flush=True
        )
    demand(sorted(witness.rows) == sorted(one.rows), "the rows of a step differ")
    ours, theirs = metrics(witness.out_dir), metrics(one.out_dir)
    demand(len(ours) == len(theirs), f"metrics.jsonl has {len(ours)} lines, not {len(theirs)}")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        demand(all(a.get(key) == b.get(key) for key in ("step", "tokens", "lr")), f"{a}; undisturbed: {b}")
        worst = max(worst, *(abs(a[key] / b[key] - 1) for key in b if key.endswith("loss")))
    demand(worst < 1e-5, f"the losses differ by {worst:.1e} of themselves")
    return f"processes {' -> '.join(map(str, sizes))}: rows equal, losses equal to {worst:.1e} of themselves"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 50), ("pair_kills", 5), ("changes", 2), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    home, source, began = Path(tempfile.mkdtemp(prefix="chaos-")), Source(args.seed), time.monotonic()
    splits = {"train": [source.draw(2_000)], "val": [source.draw(500)]}  # an epoch is over after 15 steps
    write_dataset(home / "letters", splits, Tokenizer.characters(LETTERS))
    torch.set_num_threads(1)
    try:
        for trial, count in ((alone, args.kills), (together, args.pair_kills), (resized, args.changes)):
            if count:
                print(trial(count, Random(args.seed), home), f"({time.monotonic() - began:.0f} s)", flush=True)
    except Mismatch as why:
        sys.exit(f"MISMATCH: {why}\n{home} is left as it was found")
    shutil.rmtree(home)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:])
    else:
        main()
