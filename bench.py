"""How long a training step takes: python bench.py config/train_shakespeare_char_cpu.py --steps=50

Takes the recipes of train.py; --table=True measures a list of models instead. --reference=PATH measures the nanoGPT
checkout there too, in turns. Each side is a process of its own: what one sets in torch or in the C library does not
touch the other, and each has its own memory and its own start.
"""

import contextlib
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configurator import key, parse
from load import MODEL_KEYS, Steps, load_weights, open_data_and_model, training_steps
from model import GPT, GPTConfig
from nanogpt import distributed
from nanogpt.compile import should_compile
from nanogpt.console import format_bytes, print0
from nanogpt.data.dataset import Tokens, open_dataset, token_dtype
from nanogpt.device import describe_device, free_memory, pick_device, pick_dtype, seed_everything
from nanogpt.distributed import World, explain_errors
from nanogpt.errors import InputError, run_script
from nanogpt.memory import memory_hint
from nanogpt.text.tokenizer import GPT2_VOCAB
from train import TrainConfig

TURN = 5  # steps of one side, beside a reference, before it is the other's turn
TRACED = 3  # steps in a trace
Line = dict[str, Any]  # of the table: what was measured of a side
COLUMNS: dict[str, tuple[str, int, Callable[[Any], str]]] = {  # of the table: head, width, how a line's value is told
    "parameters": ("parameters", 12, "{:,}".format),
    "ms": ("ms/step", 9, "{:.2f}".format),
    "quartiles_ms": ("quartiles", 20, "{0[0]:.2f} to {0[1]:.2f}".format),
    "tokens_per_s": ("tokens/s", 10, "{:,.0f}".format),
    "of_peak": ("of peak", 7, "{:.1%}".format),
    "mfu": ("MFU", 6, "{:.1%}".format),
    "memory": ("memory", 8, format_bytes),
    "first_step_s": ("1st step", 8, "{:.1f} s".format),
    "last_loss": ("last loss", 9, "{:.4f}".format),
}

LETTERS, MUON = {"vocab_size": 65, "block_size": 64}, {"arch": "modern", "optimizer": "muon"}
HALF_A_MILLION = {"batch_size": 32, "gradient_accumulation_steps": 16, "steps": 5}  # tokens: a step of a real run
ROWS: dict[str, dict[str, dict[str, Any]]] = {  # of the table, by device: name -> what differs from the defaults
    "cpu": {
        "nanoGPT's small, 12 × 64": LETTERS | {"n_layer": 4, "n_head": 4, "n_embd": 128, "steps": 100},
        "GPT-2 124M, 4 × 256": {"batch_size": 4, "block_size": 256, "steps": 10},
        "modern, Muon, 24 × 64": LETTERS  # config/train_shakespeare_fast_cpu.py
        | (MUON | {"n_layer": 4, "n_head": 3, "n_kv_head": 1, "n_embd": 96, "n_inner": 192})
        | {"batch_size": 24, "steps": 50},
    },
    "cuda": {
        "character GPT 10.7M, 64 × 256": LETTERS
        | {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2, "batch_size": 64, "steps": 100},
        "GPT-2 124M, 32 × 1024": {"batch_size": 32},
        "GPT-2 350M, 16 × 1024": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "batch_size": 16},
        "GPT-2 774M, 8 × 1024": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "batch_size": 8},
        "GPT-2 1558M, 4 × 1024": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "batch_size": 4},
        "GPT-2 124M, half a million tokens": HALF_A_MILLION,
        "modern 124M, Muon, half a million tokens": HALF_A_MILLION | MUON | {"n_head": 6, "head_dim": 128},
        "modern 350M, Muon, half a million tokens": MUON
        | {"n_layer": 24, "n_head": 8, "head_dim": 128, "n_embd": 1024}
        | {"batch_size": 16, "gradient_accumulation_steps": 32, "steps": 3},
    },
}


@dataclass
class BenchConfig(TrainConfig):
    """A recipe's keys with a bench's defaults; those that do not touch a step, such as eval_interval, do nothing."""

    dataset: str = key("", "rows from a folder or a name under data/; '' = random ids", group="Data")
    gradient_accumulation_steps: int = key(1, "micro-batches per step", ge=1)

    steps: int = key(20, f"steps to measure; beside a reference in turns of {TURN}", group="Bench", ge=1)
    warmup: int = key(5, "steps before them, not measured", ge=2)
    vocab_size: int = key(GPT2_VOCAB, "ids of the model, where no dataset tells", ge=2)
    profile: bool = key(False, f"trace {TRACED} more steps to trace.json")
    reference: str = key("", "a nanoGPT checkout to measure beside; its model.py is executed")
    table: bool = key(False, "measure the models of this device's table, a line each, instead of one recipe")
    only: str = key("", "the table's rows whose name contains this")
    to: str = key("", "write the figures to this file too, as JSON")

    @property
    def in_nanogpt(self) -> bool:
        """Whether nanoGPT has the model and the optimizer."""
        return (self.arch, self.optimizer, self.n_inner) == ("gpt2", "adamw", 0)


def main() -> None:
    config, given = parse(BenchConfig, description="Measure a training step.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("bench.py measures one process: start it without torchrun")
    recipes = pick_recipes(config, given, pick_device(config.device))
    if config.reference:
        load_reference(Path(config.reference))  # its faults are told before anything is measured
    world = distributed.start(config.device, config.dtype)
    dtype, how = str(world.dtype).removeprefix("torch."), "compiled" if should_compile(config, world) else "eager"
    machine = f"{describe_device(world.device)}, {dtype}, {how}, torch {torch.__version__}"
    figures: dict[str, Any] = {"command": shlex.join(sys.argv), "torch": torch.__version__, "machine": machine}
    save(config.to, figures)
    with explain_errors(f"too little memory on {world.device} for three matrices: end what else uses it"):
        reached = product_flops(world)
    torch.cuda.empty_cache()  # what the matrices took is for the sides; nothing happens without a GPU
    figures |= {"product_flops": reached, "vendor_flops": world.peak_flops(), "rows": []}
    print0(f"{machine}; matrix products reach {reached / 1e12:.3g} TFLOP/s")
    width = max(map(len, [*recipes, "  nanoGPT"])) + 1
    for name, recipe in recipes.items():
        try:
            lines = measure(name, recipe, given, reached, world)
        except InputError as error:
            if not config.table:
                raise
            lines = [{"name": name, "side": "ours", "error": "; ".join(str(error).splitlines())}]
        if not config.table:
            print0(f"a step is {lines[0]['step']}")
        if not figures["rows"]:
            print0("", " " * width + "".join(f" {head:>{wide}}" for head, wide, _ in COLUMNS.values()))
        tell(lines, width)
        figures["rows"] += lines
        save(config.to, figures)
    print0("of peak: a step's FLOP/s as a share of the matrix products'; MFU: as a share of the vendor's figure")
    if world.device.type == "cpu":
        print0("memory: the most that the process held, less what it held after its imports")
    if world.device.type == "cpu" and config.reference and world.dtype != torch.float32:
        print0("nanoGPT computes in float32 on a CPU, whatever the dtype")
    if config.profile:
        print0(f"{TRACED} steps of ours are in trace.json: open it at https://ui.perfetto.dev")


def pick_recipes(config: BenchConfig, given: dict[str, Any], device: torch.device) -> dict[str, BenchConfig]:
    """What to measure, by name: the one recipe, or rows of the table, in which what was given wins. Raises InputError
    for settings that contradict each other."""
    if config.table:
        if config.profile or config.init_from != "scratch":
            raise InputError("table=True: --profile and --init_from go with one recipe; leave them out")
        rows = ROWS.get(device.type, ROWS["cpu"])
        recipes = {n: replace(config, **(row | given)) for n, row in rows.items() if config.only.lower() in n.lower()}
        if not recipes:
            raise InputError(f"only={config.only}: no row is named so; there are: {'; '.join(rows)}")
        recipes = {n: recipe if recipe.in_nanogpt else replace(recipe, reference="") for n, recipe in recipes.items()}
    elif config.only:
        raise InputError(f"only={config.only}: picks rows of the table; add --table=True")
    elif config.reference and not config.in_nanogpt:
        told = "nanoGPT has no arch=modern, optimizer=muon or n_inner; leave these or --reference out"
        raise InputError(f"reference={config.reference}: {told}")
    else:
        recipes = {"ours": config}
    for recipe in recipes.values():
        recipe.check()
    return recipes


def measure(name: str, config: BenchConfig, given: dict[str, Any], reached: float, world: World) -> list[Line]:
    """The figures of a recipe: of ours and, where there is a reference, of nanoGPT, warmed up and then timed in turns.
    reached: FLOP/s of matrix products."""
    facts: Any = None
    sides: list[Side] = []
    with contextlib.ExitStack() as processes:
        for program in ("ours", "nanoGPT") if config.reference else ("ours",):
            sides.append(Side(program, config, given, facts))
            processes.callback(sides[-1].close)
            facts = sides[-1].ask()
            sides[-1].first_step_s = time.perf_counter() - sides[-1].started
            sides[-1].ask(config.warmup - 1)
        turn = min(TURN, config.steps) if config.reference else config.steps
        for number in range(-(-config.steps // turn)):
            for side in sides[:: -1 if number % 2 else 1]:  # who was first is second next: a drift meets both alike
                seconds, losses = side.ask(turn)
                side.seconds.append(seconds)
                side.loss = losses[-1]
        for side in sides:
            side.memory = side.ask(0)
            side.process.join()  # it tidies up
    shape, parameters, flops_per_token = facts
    rows, T = f"{config.gradient_accumulation_steps} × {config.batch_size} rows", shape.block_size
    tokens, peak, lines = config.rows_per_step * T, world.peak_flops(), []
    for side in sides:
        low, middle, high = np.percentile(side.seconds, [25, 50, 75]).tolist()
        flops = flops_per_token * tokens / middle
        line = {
            "name": name,
            "side": side.name,
            "step": f"{rows} of {T} = {tokens:,} tokens of {config.dataset or 'random ids'}",
            "parameters": parameters,
            "ms": 1000 * middle,
            "quartiles_ms": [1000 * low, 1000 * high],
            "tokens_per_s": tokens / middle,
            "of_peak": flops / reached,
            "mfu": flops / peak if peak else None,
            "memory": side.memory,
            "first_step_s": side.first_step_s,
            "last_loss": side.loss,
            "seconds": side.seconds,
        }
        lines.append(line)
    if config.reference:
        ours, theirs = (np.median(side.seconds, axis=1) for side in sides)  # (rounds,)
        lines[1]["times_as_fast"] = np.percentile(theirs / ours, [25, 50, 75]).tolist()
        lines[1]["of_its_memory"] = sides[0].memory / sides[1].memory if sides[0].memory and sides[1].memory else None
    return lines


def tell(lines: list[Line], width: int) -> None:
    """Print lines of the table, names `width` wide, and after a pair how they compare."""
    for line in lines:
        name = line["name"] if line["side"] == "ours" else f"  {line['side']}"
        if "error" in line:
            print0(f"{name:{width}} {line['error']}")
            continue
        cells = [(wide, "–" if line[key] is None else form(line[key])) for key, (_, wide, form) in COLUMNS.items()]
        print0(f"{name:{width}}" + "".join(f" {cell:>{wide}}" for wide, cell in cells))
        if "times_as_fast" in line:
            low, middle, high = line["times_as_fast"]
            rounds = f"{len(line['seconds'])} rounds of {len(line['seconds'][0])} steps each"
            told = f"{middle:.2f} times as fast (median of {rounds}; quartiles {low:.2f} to {high:.2f})"
            share = f", in {line['of_its_memory']:.2f} of the memory" if line["of_its_memory"] else ""
            print0(f"  same model, same batch: ours is {told}{share}")


def save(path: str, figures: dict[str, Any]) -> None:
    """Write the figures as JSON to `path` ('': nowhere). Raises InputError where it cannot be written."""
    try:
        if path:
            Path(path).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"to={path}: cannot be written ({error.strerror}); give another file") from error


# ---- processes


class Side:
    """One of the programs, in a process of its own, and what was measured of it."""

    def __init__(self, name: str, *settings: Any):
        """settings: what `serve` takes after its pipe."""
        self.name = name
        self.seconds: list[list[float]] = []  # (rounds, steps)
        self.loss, self.first_step_s = math.nan, math.nan
        self.memory: int | None = None  # bytes; None: unknown
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *settings))
        self.started = time.perf_counter()
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends that one
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()

    def ask(self, count: int | None = None) -> Any:
        """What the process sends for `count` steps; None: unasked. Raises the InputError that it ended with, or one
        that tells of its death."""
        try:
            if count is not None:
                self.pipe.send(count)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            why = "the system killed it, mostly for lack of memory" if code == -9 else "its last words stand above"
            raise InputError(f"{self.name}: the process died with exit code {code}: {why}") from None
        if isinstance(answer, InputError):
            raise answer
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def serve(pipe: Connection, config: BenchConfig, given: dict[str, Any], facts: Any) -> None:
    """The process of a side: ours or, given the facts of a model, nanoGPT's. After the first step it sends the facts:
    the model's shape, parameters and FLOPs per token. Then it gets numbers of steps, and sends their seconds and
    losses; for a 0 its memory in bytes (None: unknown), and ends. An InputError is sent and ends it too."""
    held, ours = resident("VmRSS"), facts is None
    try:
        world = distributed.start(config.device, config.dtype) if ours else reference_world(config)
        seed_everything(config.seed, config.deterministic)
        free = free_memory(world.device)
        remedy = memory_hint(config.micro_batches(1)[0], config.rows_per_step, config.block_size, free)
        with explain_errors(remedy):
            if ours:
                model = open_model(config, given)
                config = replace(config, **{name: getattr(model.config, name) for name in MODEL_KEYS})
                facts = model.config, model.count_parameters(), model.flops_per_token()
                steps = training_steps(config, model, open_tokens(config, model.config), world)
            else:
                steps = reference_steps(config, facts[0], open_tokens(config, facts[0]), world)
            take_turn(steps, 1, world)
            if ours:
                gc.freeze()  # as train.py does
            pipe.send(facts)
            while count := pipe.recv():
                pipe.send(take_turn(steps, count, world))
            on_gpu = world.device.type == "cuda"
            memory = torch.cuda.max_memory_allocated() if on_gpu else max(resident("VmHWM") - held, 0) or None
            if config.profile and ours:
                with torch.profiler.profile() as profiler:  # of all that the machine has: host and device
                    take_turn(steps, TRACED, world)
                profiler.export_chrome_trace("trace.json")
        pipe.send(memory)
    except InputError as error:
        pipe.send(error)
    except (EOFError, ConnectionError):  # nobody asks any more
        pass


def take_turn(steps: Steps, count: int, world: World) -> tuple[list[float], list[float]]:
    """Make `count` steps; the seconds of each, from the end of the one before, and the losses read meanwhile."""
    losses = []
    world.synchronize()
    marks = [mark(world)]
    for _ in range(count):
        losses += next(steps)
        marks.append(mark(world))
    world.synchronize()
    if world.device.type == "cuda":
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)], losses
    return [after - before for before, after in itertools.pairwise(marks)], losses


def mark(world: World) -> Any:
    """This moment: in seconds, or as an event that a GPU notes when it gets there, so that nobody waits."""
    if world.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def resident(which: str) -> int:
    """Bytes of this process in memory, by Linux's names: VmRSS, now; VmHWM, at most so far. 0 on other systems."""
    status = Path("/proc/self/status")  # getrusage's ru_maxrss begins with what the parent held
    found = re.search(rf"{which}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def product_flops(world: World) -> float:
    """FLOP/s that products of square matrices reach, in the dtype in use: the most that can be had of this device."""
    native = world.dtype in (torch.float32, pick_dtype("auto", world.device))
    n, count = (8192, 20) if world.device.type == "cuda" else (2048, 10)
    n = n if native else 256  # emulated, a large product takes a minute

    def products() -> Steps:
        a, b = (torch.randn(n, n, device=world.device, dtype=world.dtype) for _ in range(2))
        while True:
            a @ b
            yield []

    steps = products()
    take_turn(steps, 5, world)  # to warm up
    return 2 * n**3 / float(np.median(take_turn(steps, count, world)[0]))


# ---- the two sides


def open_model(config: BenchConfig, given: dict[str, Any]) -> GPT:
    """The model that train.py would start from."""
    if config.dataset:
        try:
            return open_data_and_model(replace(config, sample_chars=0), given, None)[1]
        except InputError as error:
            raise InputError(f"{error}\nto measure on random ids instead, add --dataset=") from error
    if config.init_from != "scratch":
        return load_weights(config, given)[0]
    sizes = {name: getattr(config, name) for name in MODEL_KEYS}
    return GPT(GPTConfig(vocab_size=config.vocab_size, dropout=config.dropout, **sizes))


def open_tokens(config: BenchConfig, shape: GPTConfig) -> Tokens:
    """Ids to cut rows from for a model of `shape`: the dataset's, or random ones."""
    if config.dataset:
        return open_dataset(config.dataset, block_size=shape.block_size, vocab_size=shape.vocab_size).train
    ids = np.random.default_rng(config.seed).integers(shape.vocab_size, size=1_000_000 + shape.block_size)
    return Tokens.of(ids.astype(token_dtype(shape.vocab_size)))


def load_reference(checkout: Path) -> Any:
    """The checkout's model.py as a module. Raises InputError where it is missing or not like nanoGPT's."""
    path, advice = checkout / "model.py", "give the path of a nanoGPT checkout"
    if not path.is_file():
        raise InputError(f"reference={checkout}: there is no model.py in it; {advice}")
    spec: Any = importlib.util.spec_from_file_location("reference_model", path)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.compile look it up
    try:
        spec.loader.exec_module(module)
        _ = module.GPTConfig, module.GPT.configure_optimizers
    except Exception as error:  # a stranger's file may raise anything
        raise InputError(f"reference={checkout}: its model.py cannot be used ({error!r}); {advice}") from error
    return module


def reference_world(config: BenchConfig) -> World:
    """The device and dtype as in `distributed.start`, but set up as nanoGPT's train.py does it."""
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return World(0, 1, device, pick_dtype(config.dtype, device))


def reference_steps(config: BenchConfig, shape: GPTConfig, tokens: Tokens, world: World) -> Steps:
    """nanoGPT's steps, doing what its train.py does: no autocast on a CPU, the loss of each step awaited. Raises
    InputError for a model that it does not have."""
    if shape.arch != "gpt2":
        raise InputError(f"init_from={config.init_from}: nanoGPT has no arch={shape.arch}; leave --reference out")
    reference = load_reference(Path(config.reference))
    B, T, micro_steps = config.batch_size, shape.block_size, config.gradient_accumulation_steps
    on_gpu = world.device.type == "cuda"
    # For GPT-2's ids its train.py makes a vocabulary of 50,304, to which our network pads itself.
    vocab_size = shape.padded_vocab_size if shape.vocab_size == GPT2_VOCAB else shape.vocab_size
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "bias", "block_size", "dropout")}
    with contextlib.redirect_stdout(io.StringIO()):  # it tells sizes that we have told
        model = reference.GPT(reference.GPTConfig(vocab_size=vocab_size, **sizes)).to(world.device)
        betas = (config.beta1, config.beta2)
        optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, world.device.type)
    if should_compile(config, world):
        model = torch.compile(model)
    scaler = torch.amp.GradScaler(world.device.type, enabled=on_gpu and world.dtype == torch.float16)

    def draw() -> list[Tensor]:
        # A file is mapped anew for each batch, as there.
        ids = tokens.shards[0].ids() if len(tokens.shards) == 1 else tokens
        starts = torch.randint(len(ids) - T, (B,)).tolist()

        def cut(shift: int) -> Tensor:  # (B, T)
            return torch.stack([torch.from_numpy(ids[i + shift : i + shift + T].astype(np.int64)) for i in starts])

        return world.to_device(cut(0), cut(1))

    batch = draw()
    while True:
        for _ in range(micro_steps):
            with world.autocast() if on_gpu else contextlib.nullcontext():
                loss = model(*batch)[1] / micro_steps
            batch = draw()  # before backward, as there: the host draws while a GPU computes
            scaler.scale(loss).backward()
        if config.grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield [loss.item() * micro_steps]


if __name__ == "__main__":
    run_script(main)
