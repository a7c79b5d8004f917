"""How long a training step takes: python bench.py config/train_shakespeare_char_cpu.py --steps=50

Takes the recipes of train.py. --reference=PATH measures the nanoGPT checkout there too, in turns in the same process.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configurator import key, parse
from model import GPT, GPTConfig
from nanogpt import InputError, data, distributed, optim, run_script
from nanogpt.distributed import World, explained_faults, free_memory, memory_remedy, say, size
from nanogpt.pretrained import GPT2_VOCAB
from nanogpt.tracking import Late, Stopwatch
from start import SHAPE_KEYS, load_weights, open_data_and_model, pick_micro_batch
from train import TrainConfig

TURN = 5  # steps of one side, beside a reference, before it is the other's turn
TRACED = 3  # steps in a trace
Steps = Iterator[list[float]]  # next() makes one training step, and gives the losses that were read during it


@dataclass
class BenchConfig(TrainConfig):
    """A recipe's keys with a bench's defaults; those that do not touch a step, such as eval_interval, do nothing."""

    dataset: str = key("", "rows from a folder or a name under data/; '' = random ids", group="Data")
    gradient_accumulation_steps: int = key(1, "micro-batches per step", least=1)

    steps: int = key(20, f"steps to measure; beside a reference in turns of {TURN}", group="Bench", least=1)
    warmup: int = key(5, "steps before them, not measured", least=2)
    vocab_size: int = key(GPT2_VOCAB, "ids of the model, where no dataset tells", least=2)
    profile: bool = key(False, f"trace {TRACED} more steps to trace.json")
    reference: str = key("", "a nanoGPT checkout to measure beside; its model.py is executed")


@dataclass
class Side:
    """One of the programs, and what was measured of it."""

    name: str
    steps: Steps
    seconds: list[list[float]] = field(default_factory=list)  # (rounds, steps)
    losses: list[float] = field(default_factory=list)
    memory: int | None = None  # bytes; None where it cannot be told


def main() -> None:
    config, given = parse(BenchConfig, description="Measure a training step.")
    config.check()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("bench.py measures one process: start it without torchrun")
    reference = load_reference(Path(config.reference)) if config.reference else None
    world = distributed.start(config.device, config.dtype)
    distributed.seed(config.seed, config.deterministic)
    memory_before = peak_memory(world)
    model, tokens = open_model_and_tokens(config, given)
    config = replace(config, **{name: getattr(model.config, name) for name in SHAPE_KEYS})
    sides = [Side("ours", our_steps(config, model, tokens, world))]
    if reference:
        sides.append(Side("nanoGPT", reference_steps(config, model.config, tokens, reference, world)))
    dtype, how = str(world.dtype).removeprefix("torch."), "compiled" if compiles(config, world) else "eager"
    rows = f"{config.gradient_accumulation_steps} × {config.batch_size} rows of {config.block_size}"
    tokens_per_step = config.rows_per_step * config.block_size
    say(
        f"{distributed.describe(world.device)}, {dtype}, {how}, torch {torch.__version__}",
        f"{model.count_parameters():,} parameters; a step is {rows} = {tokens_per_step:,} tokens "
        f"of {config.dataset or 'random ids'}",
    )
    remedy = memory_remedy(config.batch_size, config.rows_per_step, config.block_size, free_memory(world.device))
    with explained_faults(remedy):
        measure(sides, config, memory_before, world)
    tell(sides, config, model, world)
    if config.profile:
        with torch.profiler.profile() as profiler:  # of all that the machine has: host and device
            take_turn(sides[0], TRACED, world)
        profiler.export_chrome_trace("trace.json")
        say(f"{TRACED} steps of ours are in trace.json: open it at https://ui.perfetto.dev")


def open_model_and_tokens(config: BenchConfig, given: dict[str, Any]) -> tuple[GPT, np.ndarray]:
    """The model that train.py would start from, and ids (tokens,) to cut rows from: the dataset's, or random ones."""
    if config.dataset:
        try:
            dataset, model, _ = open_data_and_model(replace(config, sample_chars=0), given, None)
        except InputError as error:
            raise InputError(f"{error}\nto measure on random ids instead, add --dataset=") from error
        return model, dataset.train
    if config.init_from == "scratch":
        sizes = {name: getattr(config, name) for name in SHAPE_KEYS}
        model = GPT(GPTConfig(vocab_size=config.vocab_size, dropout=config.dropout, **sizes))
    else:
        model, _ = load_weights(config, given)
    shape = model.config
    ids = np.random.default_rng(config.seed).integers(shape.vocab_size, size=1_000_000 + shape.block_size)
    return model, ids.astype(data.token_dtype(shape.vocab_size))


def compiles(config: TrainConfig, world: World) -> bool:
    return config.compile is True or (config.compile == "auto" and world.device.type == "cuda")


# ---- the two sides


def our_steps(config: TrainConfig, raw_model: GPT, tokens: np.ndarray, world: World) -> Steps:
    """train.py's steps in one process, without its log; tests/test_bench.py holds the two together."""
    rows = data.Rows(tokens, config.block_size, raw_model.config.vocab_size, config.seed, config.row_order)
    raw_model.to(world.device)
    raw_model.activation_checkpointing, raw_model.loss_chunk = config.activation_checkpointing, config.loss_chunk
    micro_batch = pick_micro_batch(config, raw_model, world)
    micro_steps = config.rows_per_step // micro_batch
    model: nn.Module = raw_model
    if compiles(config, world):
        model, failure = distributed.compiled(raw_model, world, *world.put(*rows[0:micro_batch]))
        if failure:
            say(f"warning: torch.compile failed, going on without it ({failure})")
    optimizer = optim.Optimizer(raw_model, config, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    guard, late = optim.Guard(world.device, patience=1 << 30), Late(Stopwatch())
    for step in itertools.count():
        loss_sum = torch.zeros((), device=world.device)
        for micro_step in range(micro_steps):
            first_row = step * config.rows_per_step + micro_step * micro_batch
            x, y = world.put(*rows[first_row : first_row + micro_batch])  # (micro_batch, block_size) each
            if config.dropout:
                torch.manual_seed(data.mix(config.seed, step, micro_step, world.rank))
            with world.autocast():
                _, loss = model(x, y)
            scaler.scale(loss / micro_steps).backward()
            loss_sum += loss.detach()
        mean_loss = loss_sum / micro_steps
        scaler.unscale_(optimizer)  # type: ignore[arg-type]
        grad_norm = optim.gradient_norm(raw_model.parameters())
        skip = guard.check(mean_loss, grad_norm)
        factor = config.learning_rate_at(step) / config.learning_rate
        optimizer.step(factor, optim.shrink_to(config.grad_clip, grad_norm), skip)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        late.put(step, torch.stack([mean_loss, grad_norm, guard.bad_in_a_row]))
        yield [values[0] for _, values, _ in late.take()]


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


def reference_steps(config: TrainConfig, shape: GPTConfig, tokens: np.ndarray, reference: Any, world: World) -> Steps:
    """nanoGPT's steps, doing what its train.py does: no autocast on a CPU, the loss of each step awaited."""
    B, T, micro_steps = config.batch_size, shape.block_size, config.gradient_accumulation_steps
    on_gpu = world.device.type == "cuda"
    # For GPT-2's ids its train.py makes a vocabulary of 50,304, to which our network pads itself.
    vocab_size = shape.padded_vocab_size if shape.vocab_size == GPT2_VOCAB else shape.vocab_size
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "bias", "block_size", "dropout")}
    with contextlib.redirect_stdout(io.StringIO()):  # it tells sizes that we have told
        model = reference.GPT(reference.GPTConfig(vocab_size=vocab_size, **sizes)).to(world.device)
        betas = (config.beta1, config.beta2)
        optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, world.device.type)
    if compiles(config, world):
        model = torch.compile(model)
    scaler = torch.amp.GradScaler(world.device.type, enabled=on_gpu and world.dtype == torch.float16)

    def draw() -> list[Tensor]:
        # A file is mapped anew for each batch, as there.
        ids = np.memmap(tokens.filename, tokens.dtype, "r") if isinstance(tokens, np.memmap) else tokens  # type: ignore
        starts = torch.randint(len(ids) - T, (B,)).tolist()

        def cut(shift: int) -> Tensor:  # (B, T)
            return torch.stack([torch.from_numpy(ids[i + shift : i + shift + T].astype(np.int64)) for i in starts])

        return world.put(cut(0), cut(1))

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


# ---- measuring


def measure(sides: list[Side], config: BenchConfig, memory_before: int | None, world: World) -> None:
    """Warm up, then time the sides in turns. Memory is the peak of a side's warm-up beyond what was taken before it."""
    on_gpu = world.device.type == "cuda"
    for number, side in enumerate(sides):
        if number and on_gpu:
            torch.cuda.reset_peak_memory_stats()
            memory_before = peak_memory(world)
        take_turn(side, config.warmup, world)
        peak = peak_memory(world)
        if peak is not None and memory_before is not None and (on_gpu or number == 0):  # a process's peak never falls
            side.memory = peak - memory_before
    turn = min(TURN, config.steps) if len(sides) > 1 else config.steps
    for number in range(-(-config.steps // turn)):
        for side in sides[:: -1 if number % 2 else 1]:  # who was first is second next: a drift meets both alike
            side.seconds.append(take_turn(side, turn, world))


def take_turn(side: Side, count: int, world: World) -> list[float]:
    """Make `count` steps; the seconds of each, from the end of the one before."""
    world.synchronize()
    marks = [mark(world)]
    for _ in range(count):
        side.losses += next(side.steps)
        marks.append(mark(world))
    world.synchronize()
    if world.device.type == "cuda":
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]
    return [after - before for before, after in itertools.pairwise(marks)]


def mark(world: World) -> Any:
    """This moment: in seconds, or as an event that a GPU notes when it gets there, so that nobody waits."""
    if world.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory(world: World) -> int | None:
    """Bytes: a GPU's, the most that tensors have taken; a CPU's, the process's largest resident set; None: unknown."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if world.device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # Unix alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tell(sides: list[Side], config: BenchConfig, model: GPT, world: World) -> None:
    """The table and, of two sides, how they compare."""
    tokens, peak_flops = config.rows_per_step * config.block_size, world.peak_flops()
    say(f"\n{'':8}{'ms/step':>10}{'quartiles':>20}{'tokens/s':>12}{'MFU':>8}{'memory':>10}{'last loss':>11}")
    for side in sides:
        low, middle, high = np.percentile(side.seconds, [25, 50, 75])
        mfu = f"{model.flops_per_token() * tokens / middle / peak_flops:.1%}" if peak_flops else "–"
        memory = "–" if side.memory is None else size(side.memory)
        say(
            f"{side.name:8}{1000 * middle:>10.2f}{f'{1000 * low:.2f} to {1000 * high:.2f}':>20}"
            f"{tokens / middle:>12,.0f}{mfu:>8}{memory:>10}{side.losses[-1]:>11.4f}"
        )
    if world.device.type == "cpu":
        say("memory: how far the process's largest resident set grew in the warm-up, our model included")
    if len(sides) == 2:
        ours, theirs = (np.median(side.seconds, axis=1) for side in sides)  # (rounds,)
        low, middle, high = np.percentile(theirs / ours, [25, 50, 75])
        rounds = f"{len(ours)} rounds of {len(sides[0].seconds[0])} steps each"
        say(
            f"same model, same batch: ours is {middle:.2f} times as fast "
            f"(median of {rounds}; quartiles {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    run_script(main)
