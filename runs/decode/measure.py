"""Decoding speed beside nanoGPT's and transformers', and beside what the memory allows.

    python runs/decode/measure.py --reference=CHECKOUT_OF_NANOGPT --to=runs/decode/cpu.json
    python runs/decode/measure.py --device=cuda --to=runs/decode/gpu.json

For each size, batch and context every program in turn generates a few tokens with temperature 0.8 and top-k 200,
several times over; the weights are random. `limit` is the time to read the bytes that our program needs for a token,
weights and KV cache, at the speed at which this machine multiplies two halves of 1 GiB (`dot`, which reads faster than
a sum), measured in the same turns; `read_gb_per_s` is that speed. A shared L3 cache larger than the weights may hold a
part of them: `caches` has its size. "ours" is what sample.py does by itself, in the format `format`. At batch 1 "ours
float16" are embedding bags, and "packed float16" what several texts take. int8 is FBGEMM's (weights and activations in
8 bits, one scale a row); it stays here, docs/optimizations.md says why.

    python runs/decode/measure.py --loss=OUT_DIR --to=runs/decode/loss.json

measures the validation loss of a run's model with its linear layers in each format, and

    python runs/decode/measure.py --whole=1000 --batches=1 --reference=CHECKOUT_OF_NANOGPT --to=runs/decode/whole.json

the seconds that each program's own function takes for 1,000 tokens after a prompt of one: transformers' `generate`,
and what nanoGPT's sample.py calls.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model import GPT, GPTConfig  # noqa: E402
from nanogpt import checkpoint, distributed  # noqa: E402
from nanogpt.data.dataset import open_dataset  # noqa: E402
from nanogpt.data.rows import EvalWindows  # noqa: E402
from nanogpt.device import describe_device, synchronize  # noqa: E402
from nanogpt.evaluation import evaluate  # noqa: E402
from nanogpt.generate.decoder import Decoder  # noqa: E402
from nanogpt.generate.low_precision import (  # noqa: E402
    PackedLinear,
    can_pack,
    replace_linears,
    rounded_linear,
    to_inference_precision,
)
from nanogpt.generate.sampling import Sampling, sample_tokens  # noqa: E402
from nanogpt.trials import cpu_info, cpu_model  # noqa: E402

SIZES = {"124M": (12, 12, 768), "1558M": (48, 25, 1600)}  # layers, heads, channels
SAMPLING = Sampling(temperature=0.8, top_k=200)
Step = Callable[[], Any]
Make = Callable[[int], Step]


class Int8Linear(nn.Module):
    """int8 weights with a scale for each row; activations are quantized dynamically."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        scales = weight.abs().amax(1).clamp(min=1e-8).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight.detach(), scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)


def decoding(model: GPT, rows: int, compiled: bool, amp: Any) -> tuple[Decoder, Make]:
    """Return a decoder and a function that makes its step; one decoder for all contexts, so compiled once."""
    if compiled:
        torch._dynamo.reset()  # the versions compiled for other decoders count against a limit
    with amp:
        decoder = Decoder(model, rows, compiled=compiled)

    def start(context: int) -> Step:
        with amp:
            logits = [decoder.prefill([torch.randint(50_000, (context,)).tolist()] * rows)]

        def step() -> None:
            with amp:
                ids = sample_tokens(logits[0], SAMPLING, range(rows), [context] * rows)
                ids.tolist()  # as sample.py does, to print them
                logits[0] = decoder.decode_step(ids)

        return step

    return decoder, start


def nanogpt_step(model: Any, rows: int, context: int, device: str) -> Step:
    idx = torch.randint(50_000, (rows, context), device=device)
    return lambda: model.generate(idx, 1, temperature=0.8, top_k=200)


def transformers_step(model: Any, rows: int, context: int, device: str) -> Step:
    """A step of transformers' `generate`, with random keys and values for the prompt."""
    import transformers

    c = model.config
    cache = transformers.DynamicCache()
    for layer in range(c.n_layer):
        random = torch.randn(2, rows, c.n_head, context - 1, c.n_embd // c.n_head, device=device, dtype=model.dtype)
        cache.update(random[0], random[1], layer)
    ids = torch.randint(50_000, (rows, 1), device=device)
    warp = [transformers.TemperatureLogitsWarper(0.8), transformers.TopKLogitsWarper(200)]

    @torch.no_grad()
    def step() -> None:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].float()
        for each in warp:
            logits = each(ids, logits)
        ids.copy_(torch.multinomial(logits.softmax(-1), 1))

    return step


def seconds(step: Step, count: int, world: Any) -> float:
    """Time a step. With one thread on a CPU: its own time, without that of other programs."""
    clock = time.process_time if world.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(1 if world.device.type == "cpu" else 5):  # warm-up
        step()
    synchronize(world.device)
    start_time = clock()
    for _ in range(count):
        step()
    synchronize(world.device)
    return (clock() - start_time) / count


@dataclass
class Program:
    """A function that makes its step for a context, and one that generates N tokens the program's own way."""

    make: Make
    write: Callable[[int], Any]
    item_bytes: int = 0  # of a number in our KV cache
    format: str = ""  # of our weights


def make_programs(size: str, rows: int, reference: str | None, world: Any) -> tuple[dict[str, Program], int]:
    """Return the programs, and the bytes of our weights."""
    import transformers

    (n_layer, n_head, n_embd), device = SIZES[size], str(world.device)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).to(device).eval()
    programs: dict[str, Program] = {}
    one = torch.full((rows, 1), 50_256, device=device)

    def add(name: str, change: Callable[[GPT], Any]) -> None:
        model = GPT.from_tensors(plain.config, dict(plain.state_dict())).eval()
        amp = change(model) or contextlib.nullcontext()
        decoder, start = decoding(model, rows, world.device.type == "cuda", amp)

        def write(tokens: int) -> None:
            with amp:
                for _ in decoder.generate(one.tolist(), tokens, SAMPLING):
                    pass

        head = model.head.weight.dtype if isinstance(model.head, nn.Linear) else type(model.head).__name__
        programs[name] = Program(start, write, decoder.cache.keys.itemsize, str(head))

    def add_transformers(name: str, dtype: torch.dtype) -> None:
        config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        model = transformers.GPT2LMHeadModel(config).to(device, dtype).eval()
        options = {"do_sample": True, "temperature": 0.8, "top_k": 200, "pad_token_id": 50_256, "eos_token_id": None}

        def write(tokens: int) -> None:
            model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=tokens, **options)

        programs[name] = Program(lambda context: transformers_step(model, rows, context, device), write)

    if world.device.type == "cpu":
        for dtype in ("auto", "float32", "float16", "bfloat16"):
            name = "ours" if dtype == "auto" else f"ours {dtype}"
            add(name, lambda model, dtype=dtype: to_inference_precision(model, world, dtype, False, rows))
        if can_pack() and rows == 1:
            add("packed float16", lambda model: replace_linears(model, PackedLinear))
        if can_pack():
            add("int8", lambda model: replace_linears(model, Int8Linear))
    else:
        add("ours", lambda model: to_inference_precision(model, world, "auto", True, rows))
    add_transformers("transformers bfloat16", torch.bfloat16)
    if world.device.type == "cpu":
        add_transformers("transformers float32", torch.float32)
    if reference:
        sys.modules.pop("model")
        sys.path.insert(0, reference)
        import model as checkout  # nanoGPT's

        sys.path.pop(0)
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024, "vocab_size": 50304}
        nano = checkout.GPT(checkout.GPTConfig(**shape, bias=True, dropout=0.0)).to(device).eval()
        programs["nanoGPT"] = Program(
            lambda context: nanogpt_step(nano, rows, context, device),
            lambda tokens: nano.generate(one, tokens, temperature=0.8, top_k=200),
        )
    return programs, 2 * sum(p.numel() for p in plain.parameters())


def losses(out_dir: str, world: Any) -> dict[str, float]:
    """Measure the validation loss of a run's model on up to 200 windows, with its linear layers in each format."""
    world = replace(world, dtype=torch.float32)  # mixed precision is part of the formats below
    state = checkpoint.load(checkpoint.find(out_dir), with_optimizer=False).state
    config = state["config"]
    dataset = open_dataset(config["dataset"], block_size=config["block_size"])
    windows = EvalWindows(dataset.val, config["block_size"], 20, 10, state["model"]["vocab_size"])
    formats: dict[str, tuple[Callable[[GPT], Any], Any]] = {"float32": (lambda model: None, contextlib.nullcontext())}
    for dtype in (torch.bfloat16, torch.float16):
        layer = partial(rounded_linear, dtype=dtype)
        amp = torch.autocast(world.device.type, dtype)
        formats[str(dtype).removeprefix("torch.")] = partial(replace_linears, layer=layer), amp
    if world.device.type == "cpu" and can_pack():
        formats["float16 packed"] = partial(replace_linears, layer=PackedLinear), contextlib.nullcontext()
        formats["int8"] = partial(replace_linears, layer=Int8Linear), contextlib.nullcontext()
    result = {}
    for name, (change, amp) in formats.items():
        model = GPT.from_checkpoint(out_dir).to(world.device)
        change(model)
        with amp, torch.no_grad():
            result[name] = evaluate(model, windows, 10, world)
    return result


def selected_programs(args: argparse.Namespace, size: str, rows: int, world: Any) -> tuple[dict[str, Program], int]:
    programs, weight_bytes = make_programs(size, rows, args.reference, world)
    only = args.only.split(",") if args.only else programs
    return {name: program for name, program in programs.items() if name in only}, weight_bytes


def whole_runs(args: argparse.Namespace, world: Any) -> list[dict[str, Any]]:
    results = []
    for size in args.sizes.split(","):
        for rows in map(int, args.batches.split(",")):
            elapsed = {}
            for name, program in selected_programs(args, size, rows, world)[0].items():
                program.write(3)
                synchronize(world.device)
                start_time = time.perf_counter()
                program.write(args.whole)
                synchronize(world.device)
                elapsed[name] = round(time.perf_counter() - start_time, 2)
                print(f"{size}, batch {rows}, {args.whole} tokens: {name} {elapsed[name]} s", flush=True)
            results.append({"size": size, "batch": rows, "tokens": args.whole, "seconds": elapsed})
    return results


def speeds(args: argparse.Namespace, world: Any) -> list[dict[str, Any]]:
    results = []
    large = torch.ones(2, 2**27 if world.device.type == "cpu" else 2**29, device=world.device)
    for size in args.sizes.split(","):
        for rows in map(int, args.batches.split(",")):
            programs, weight_bytes = selected_programs(args, size, rows, world)
            for context in map(int, args.contexts.split(",")):
                n_layer, _, n_embd = SIZES[size]
                item_bytes = programs["ours"].item_bytes  # of our KV cache
                read = weight_bytes + 2 * n_layer * n_embd * rows * context * item_bytes
                steps = {name: program.make(context) for name, program in programs.items()}
                times: dict[str, list[float]] = {name: [] for name in programs} | {"limit": []}
                for _ in range(args.rounds):
                    times["limit"].append(read / large.nbytes * seconds(partial(torch.dot, *large), 2, world))
                    for name, step in steps.items():
                        count = max(1, args.tokens // (1 if name.startswith(("ours", "packed", "int8")) else 5))
                        times[name].append(seconds(step, count, world))
                ratios = {
                    name: statistics.median(a / b for a, b in zip(values, times["ours"], strict=True))
                    for name, values in times.items()
                }
                rate = {name: round(rows / statistics.median(values), 2) for name, values in times.items()}
                results.append(
                    {"size": size, "batch": rows, "context": context, "tokens_per_s": rate}
                    | {"format": programs["ours"].format}
                    | {"ours_is_faster_by": {name: round(ratio, 3) for name, ratio in ratios.items()}}
                    | {"read_gb_per_s": [round(read / value / 1e9, 1) for value in times["limit"]]}
                    | {"seconds": times}
                )
                summary = ", ".join(f"{name} {rate[name]} ({ratios[name]:.2f})" for name in times)
                print(f"{size}, batch {rows}, context {context}: tok/s (times ours' speed): {summary}", flush=True)
    return results


def caches() -> str:
    """The sizes of the caches as the system states them; "" where it has no lscpu."""
    with contextlib.suppress(OSError):
        lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
        return "; ".join(" ".join(line.split()) for line in lines if " cache:" in line)
    return ""


def fast_flags() -> list[str]:
    return [flag for flag in cpu_info().get("flags", "").split() if flag.startswith(("avx", "amx", "f16c", "fma"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("device", "cpu"), ("sizes", "124M"), ("batches", "1,8"), ("contexts", "100,500,1000")):
        parser.add_argument(f"--{name}", default=default)
    for name, count in (("rounds", 5), ("tokens", 10), ("whole", 0), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    for name in ("reference", "only", "loss", "to"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    world = distributed.start(args.device, "auto")
    if args.loss:
        results: dict[str, Any] = {"val_loss": losses(args.loss, world)}
    else:
        results = {"results": whole_runs(args, world) if args.whole else speeds(args, world)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {"command": " ".join(["python", "runs/decode/measure.py", *sys.argv[1:]]), "commit": commit.stdout.strip()}
    about |= {"cpu": cpu_model(), "caches": caches(), "flags": " ".join(fast_flags())}
    about |= {"machine": f"{describe_device(world.device)}, {platform.machine()}", "cores": os.cpu_count()}
    about |= {
        "dtype": str(world.dtype),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(results, indent=1) if args.loss else "")
    if args.to:
        Path(args.to).write_text(json.dumps(about | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
