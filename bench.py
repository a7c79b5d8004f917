"""Measure a training step: python bench.py config/train_shakespeare_char_cpu.py --steps=50

Takes the recipes of train.py; --table=True measures a list of models instead. --reference=PATH measures the nanoGPT
checkout there too, in alternating rounds. Each program runs in its own process, so that neither inherits the other's
memory or settings of torch and the C library.
"""

import contextlib
import gc
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from budget import training_steps
from configurator import key, parse
from load import (
    choose_dtype,
    load_data_and_model,
    load_weights,
    micro_batch_sizes,
    new_model,
)
from model import GPT, GPTConfig
from nanogpt import distributed
from nanogpt.compile import should_compile
from nanogpt.console import format_bytes, print0
from nanogpt.data.dataset import Tokens, document_separator_id, dtype_for, open_dataset
from nanogpt.device import describe_device, free_memory, peak_flops, seed_everything
from nanogpt.distributed import World
from nanogpt.errors import InputError, run_script
from nanogpt.files import check_report, write_report
from nanogpt.lora import add_lora
from nanogpt.memory import memory_hint
from nanogpt.rendezvous import world_size
from nanogpt.text.tokenizer import GPT2_VOCAB
from nanogpt.timing import Round, Worker, measure_matmul_flops
from runs.bench_cpu import nanogpt_steps
from train import TrainConfig, check_config, train_step

ROUND = 5  # steps of one program before it is the other's turn
PROFILED_STEPS = 3

CHARACTERS = "--block_size=64 --vocab_size=65"
MUON = "--arch=modern --optimizer=muon"
HALF_A_MILLION = "--batch_size=32 --gradient_accumulation_steps=16 --steps=5"  # tokens, as in a real run
TABLES = {  # by device: the name of a row and its flags
    "cpu": {
        "nanoGPT's small, 12 × 64": f"{CHARACTERS} --n_layer=4 --n_head=4 --n_embd=128 --steps=100",
        "GPT-2 124M, 4 × 256": "--batch_size=4 --block_size=256 --steps=10",
        "modern, Muon, 24 × 64": f"{CHARACTERS} {MUON} --n_layer=4 --n_head=3 --n_kv_head=1 --n_embd=96 --n_inner=192 "
        "--batch_size=24 --steps=50",
    },
    "cuda": {
        "character GPT 10.7M, 64 × 256": "--n_layer=6 --n_head=6 --n_embd=384 --dropout=0.2 "
        "--batch_size=64 --block_size=256 --vocab_size=65 --steps=100",
        "GPT-2 124M, 32 × 1024": "--batch_size=32",
        "GPT-2 350M, 16 × 1024": "--n_layer=24 --n_head=16 --n_embd=1024 --batch_size=16",
        "GPT-2 774M, 8 × 1024": "--n_layer=36 --n_head=20 --n_embd=1280 --batch_size=8",
        "GPT-2 1558M, 4 × 1024": "--n_layer=48 --n_head=25 --n_embd=1600 --batch_size=4",
        "GPT-2 124M, half a million tokens": HALF_A_MILLION,
        "modern 124M, Muon, half a million tokens": f"{HALF_A_MILLION} {MUON} --n_head=6 --head_dim=128",
        "modern 350M, Muon, half a million tokens": f"{MUON} --n_layer=24 --n_head=8 --head_dim=128 --n_embd=1024 "
        "--batch_size=16 --gradient_accumulation_steps=32 --steps=3",
    },
}
COLUMNS = [  # field of a row, header, width, format
    ("parameters", "parameters", 12, "{:,}".format),
    ("dtype", "dtype", 9, "{}".format),
    ("ms", "ms/step", 9, "{:.2f}".format),
    ("quartiles_ms", "quartiles", 20, "{0[0]:.2f} to {0[1]:.2f}".format),
    ("tokens_per_s", "tokens/s", 10, "{:,.0f}".format),
    ("of_peak", "of peak", 7, "{:.1%}".format),
    ("mfu", "MFU", 6, "{:.1%}".format),
    ("memory", "memory", 8, format_bytes),
    ("first_step_s", "1st step", 8, "{:.1f} s".format),
    ("last_loss", "last loss", 9, "{:.4f}".format),
]
LEGEND = """\
of peak: FLOP/s of a step over those of matrix products in our dtype; MFU: over the vendor's figure
memory: the peak of torch's allocations on a GPU; on a CPU that of the process, less its imports"""
Row = dict[str, Any]  # the measurements of one program
NANOGPT_HAS = {
    "arch": "gpt2",
    "optimizer": "adamw",
    "n_inner": 0,
    "lora_rank": 0,
    "ngram_targets": 0,
    "mask_documents": False,
}


@dataclass
class BenchConfig(TrainConfig):
    """The keys of a recipe and of the measurement. Keys without effect on a step, such as eval_interval, do nothing."""

    dataset: str = key("", "folder, or name under data/, to take rows from; '': random ids", group="Data")
    gradient_accumulation_steps: int = key(1, "micro-batches per step", ge=1, le=2**20)

    steps: int = key(20, f"steps to measure; with --reference in rounds of {ROUND}", group="Bench", ge=1)
    warmup: int = key(5, "steps before them, not measured", ge=2)
    vocab_size: int = key(GPT2_VOCAB, "vocabulary size for random ids", ge=2, le=2**30)
    profile: bool = key(False, f"write a trace of {PROFILED_STEPS} more steps to trace.json")
    reference: str = key("", "nanoGPT checkout to measure too; its model.py is executed (in float32 on a CPU)")
    table: bool = key(False, "measure this device's list of models instead of one recipe")
    only: str = key("", "rows of the table whose names contain this")
    to: str = key("", "file for the measurements, as JSON")


def main() -> None:
    config, explicit = parse(BenchConfig, description="Measure a training step.")
    if world_size() > 1:
        raise InputError("bench.py measures one process: start it without torchrun")
    if config.to:
        check_report("to", config.to)
    world = distributed.start(config.device, config.dtype)
    recipes = pick_recipes(config, explicit, world.device)
    if config.reference:
        nanogpt_steps.load_model_file(config.reference)  # report its problems before measuring
    # On a CPU each recipe may have a dtype of its own.
    is_dtype_measured = config.dtype == "auto" and world.device.type == "cpu"
    dtypes = [torch.float32, torch.bfloat16] if is_dtype_measured else [world.dtype]
    worlds = [replace(world, dtype=dtype) for dtype in dtypes]
    mode = "compiled" if should_compile(config.compile, world.device) else "eager"
    machine = f"{describe_device(world.device)}, {mode}, torch {torch.__version__}"
    report: dict[str, Any] = {"command": shlex.join(sys.argv), "torch": torch.__version__, "machine": machine}

    peaks = {world.dtype_name: measure_matmul_flops(world) for world in worlds}
    torch.cuda.empty_cache()  # leaves the memory to the workers; does nothing without a GPU
    report |= {"product_flops": peaks, "vendor_flops": peak_flops(world.device, world.dtype), "rows": []}
    reached = " and ".join(f"{peak / 1e12:.3g} TFLOP/s in {dtype}" for dtype, peak in peaks.items())
    print0(f"{machine}; matrix products reach {reached}")
    width = max(map(len, [*recipes, "  nanoGPT"])) + 1
    print0("", " " * width + "".join(f" {header:>{column}}" for _, header, column, _ in COLUMNS))
    for name, recipe in recipes.items():
        try:
            rows = measure(name, recipe, explicit, world, peaks)
        except InputError as error:
            if not config.table:
                raise
            rows = [{"name": name, "side": "ours", "error": "; ".join(str(error).splitlines())}]
        print_rows(rows, width)
        report["rows"] += rows
        if config.to:
            write_report("to", config.to, report)
    if not config.table:
        print0(f"a step: {rows[0]['step']}")
    print0(LEGEND)
    if config.profile:
        print0(f"trace.json has {PROFILED_STEPS} steps of ours: open it at https://ui.perfetto.dev")


def pick_recipes(config: BenchConfig, explicit: dict[str, Any], device: torch.device) -> dict[str, BenchConfig]:
    """Recipes to measure by name: the one given, or rows of the table, which explicit keys override.

    Raises InputError for settings that contradict each other.
    """
    recipes = {"ours": config}
    if config.table:
        if config.profile or config.init_from != "scratch":
            raise InputError("--table=True: --profile and --init_from need a single recipe; leave them out")
        table = TABLES.get(device.type, TABLES["cpu"])
        names = [name for name in table if config.only.lower() in name.lower()]
        if not names:
            raise InputError(f"--only={config.only}: no row has this in its name; the rows are {'; '.join(table)}")
        recipes = {name: replace(config, **parse(BenchConfig, table[name].split())[1] | explicit) for name in names}
    elif config.only:
        raise InputError(f"--only={config.only}: selects rows of the table; add --table=True")
    for name, recipe in recipes.items():
        check_config(recipe)
        values = {setting: getattr(recipe, setting) for setting in NANOGPT_HAS}
        unsupported = [f"{setting}={value}" for setting, value in values.items() if value != NANOGPT_HAS[setting]]
        if config.reference and unsupported:
            if not config.table:
                raise InputError(
                    f"--reference={config.reference}: nanoGPT has no {', '.join(unsupported)}; leave --reference out"
                )
            recipes[name] = replace(recipe, reference="")
    return recipes


def measure(
    name: str, config: BenchConfig, explicit: dict[str, Any], world: World, peaks: dict[str, float]
) -> list[Row]:
    """Time a recipe's steps by our program and, with a reference, by nanoGPT in alternating rounds.

    peaks: FLOP/s of matrix products, by dtype.
    """
    free = free_memory(world.device)
    hint = memory_hint(micro_batch_sizes(config, 1)[0], config.rows_per_step, config.block_size, free)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker("ours", hint, open_our_steps, config, explicit))
        model_config: GPTConfig
        model_config, dtype = ours.info
        workers = [ours]
        if config.reference:
            workers.append(stack.enter_context(Worker("nanoGPT", hint, open_nanogpt_steps, config, model_config)))
        for worker in workers:
            worker.run(config.warmup - 1)
        rounds: dict[str, list[Round]] = {worker.name: [] for worker in workers}
        round_steps = min(ROUND, config.steps) if config.reference else config.steps
        for number in range(math.ceil(config.steps / round_steps)):
            # Alternate who begins, so that a drift of the machine's speed affects both alike.
            for worker in workers[:: -1 if number % 2 else 1]:
                rounds[worker.name].append(worker.run(round_steps))
        if config.profile:
            ours.run(PROFILED_STEPS, "trace.json")

    with torch.device("meta"):
        model = GPT(model_config)
    tokens = config.rows_per_step * model_config.block_size
    step = f"{config.gradient_accumulation_steps} × {config.batch_size} rows of {model_config.block_size} = {tokens:,}"
    vendor_peak = peak_flops(world.device, world.dtype)
    rows: list[Row] = []
    for worker in workers:
        seconds = [timed.seconds for timed in rounds[worker.name]]
        last = rounds[worker.name][-1]
        low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
        flops = model.flops_per_token() * tokens / median
        row = {
            "name": name,
            "side": worker.name,
            "step": f"{step} tokens of {config.dataset or 'random ids'}",
            "parameters": model.count_parameters(),
            "dtype": dtype if worker is ours else worker.info,
            "ms": 1000 * median,
            "quartiles_ms": [1000 * low, 1000 * high],
            "tokens_per_s": tokens / median,
            "of_peak": flops / peaks[dtype],
            "mfu": flops / vendor_peak if vendor_peak else None,
            "memory": last.memory,
            "first_step_s": worker.first_step_s,
            "last_loss": last.losses[-1],
            "seconds": seconds,
        }
        rows.append(row)
    if config.reference:
        ours_row, row = rows
        ratios = np.median(row["seconds"], axis=1) / np.median(ours_row["seconds"], axis=1)  # (rounds,)
        row["times_as_fast"] = np.percentile(ratios, [25, 50, 75]).tolist()
        memories = ours_row["memory"], row["memory"]
        row["of_its_memory"] = memories[0] / memories[1] if all(memories) else None
    return rows


def print_rows(rows: list[Row], width: int) -> None:
    """Print rows of the table, with names `width` wide, and the comparison with nanoGPT."""
    for row in rows:
        line = f"{row['name'] if row['side'] == 'ours' else '  ' + row['side']:{width}}"
        if "error" in row:
            print0(f"{line} {row['error']}")
            continue
        for field, _, column, form in COLUMNS:
            line += f" {'–' if row[field] is None else form(row[field]):>{column}}"
        print0(line)
        if "times_as_fast" in row:
            low, median, high = row["times_as_fast"]
            rounds = f"{len(row['seconds'])} rounds of {len(row['seconds'][0])} steps each"
            memory = f", in {row['of_its_memory']:.2f} of the memory" if row["of_its_memory"] else ""
            print0(
                f"  same model, same batch: ours is {median:.2f} times as fast (median of {rounds}; quartiles "
                f"{low:.2f} to {high:.2f}){memory}"
            )


# --- In the worker processes


def open_our_steps(
    config: BenchConfig, explicit: dict[str, Any]
) -> tuple[World, tuple[GPTConfig, str], Iterator[list[float]]]:
    world = distributed.start(config.device, config.dtype)
    seed_everything(config.seed, config.deterministic)
    model = open_model(config, explicit, world)
    config = replace(config, block_size=model.config.block_size)
    config, world = choose_dtype(config, model.config, world)
    steps = training_steps(config, model, open_tokens(config, model.config), world, train_step)
    gc.freeze()  # as train.py does
    return world, (model.config, world.dtype_name), steps


def open_model(config: BenchConfig, explicit: dict[str, Any], world: World) -> GPT:
    """Make the model that train.py would start from."""
    if config.dataset:
        dataset, model, _ = load_data_and_model(replace(config, sample_chars=0), explicit, None, world)
        model.document_separator_id = document_separator_id(dataset, config.mask_documents)
        return model
    if config.init_from != "scratch":
        model, _ = load_weights(config, explicit, world)
        if config.lora_rank:
            add_lora(model, config.init_from, config.lora_rank, config.lora_alpha, config.lora_targets)
        return model
    return new_model(config, config.vocab_size, world)


def open_tokens(config: BenchConfig, model_config: GPTConfig) -> Tokens:
    """Tokens to take rows from: the dataset's, or random ones."""
    T, V = model_config.block_size, model_config.vocab_size
    if config.dataset:
        return open_dataset(config.dataset, block_size=T, vocab_size=V, token_dtype=config.token_dtype).train
    ids = np.random.default_rng(config.seed).integers(V, size=1_000_000 + T)
    return Tokens.of(ids.astype(dtype_for(V)))


def open_nanogpt_steps(config: BenchConfig, model_config: GPTConfig) -> tuple[World, str, Iterator[list[float]]]:
    """Steps of nanoGPT with the sizes of our model. Raises InputError for a model that nanoGPT does not have."""
    if model_config.arch != "gpt2":
        raise InputError(f"--reference={config.reference}: nanoGPT has no arch={model_config.arch}; leave it out")
    world = nanogpt_steps.start_world(config.device, config.dtype)
    seed_everything(config.seed, config.deterministic)
    tokens = open_tokens(config, model_config)
    dtype = world.dtype_name if world.device.type == "cuda" else "float32"
    return world, dtype, nanogpt_steps.training_steps(config, model_config, tokens, world)


if __name__ == "__main__":
    run_script(main)
