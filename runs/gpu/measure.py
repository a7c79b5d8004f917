"""The measurements that need a GPU, in stages, each with a result file of its own beside this script.

    python runs/gpu/measure.py --reference=NANOGPT_CHECKOUT --stages=attention,table,decode,character,best,books

Correctness on a GPU is tested by `make test-gpu`. The checkout needs data/shakespeare_char prepared; `books` needs
--books=books.tar.xz, any archive of .txt files. --trial=True runs all stages on a CPU in a few minutes to test the
script; its numbers mean nothing.

attention      flash and cuDNN attention, forward and backward, at the shapes that matter
deterministic  a step of 124M with --deterministic=True and without
levers         a step of the fast recipe, compiled and not, with soft targets and without
table          bench.py --table=True with nanoGPT (for a part of it: --stages=table --only=…)
decode         tokens/s of generation, batch 1 and 64, 124M and 1558M, with transformers and the bandwidth limit
character      whole processes: nanoGPT's run of 10.6M parameters, and the time to its loss by our fast recipe
best           the lowest loss on tiny Shakespeare within that run's tokens and parameters: a line per variant
books          nanoGPT's recipe for 124M on books for five minutes, and the time to its loss by the modern recipe

Predictions, written before the first run: 124M at 62% of the matrix peak and 1.35 times nanoGPT; cuDNN 1.2 times flash;
CUDA graphs 1.4 times at 10.6M parameters; Muon 2% of a step of half a million tokens; the loss 1.4697 in a twelfth of
nanoGPT's time; best loss 1.41; the books' loss in a third of the time. Decoding at batch 1: 15% of the bandwidth limit
at 124M, 45% at 1558M, three times transformers; at batch 64 twice. Soft targets: 1.4 times the compiled step of the
fast recipe, because the host looks up its 16,384 contexts in 7 ms, and no more of the plain one; with look_back 0.01
lower a loss at 600 steps, and no lower one at 2,500.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import statistics
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]
os.environ["PYTHONPATH"] = str(ROOT)  # the data scripts import the package, installed or not

from compare_with_nanogpt import EVALUATION, commit, run  # noqa: E402

from configurator import key, parse  # noqa: E402
from model import GPT  # noqa: E402
from nanogpt import distributed  # noqa: E402
from nanogpt.data.dataset import open_dataset  # noqa: E402
from nanogpt.data.rows import EvalWindows  # noqa: E402
from nanogpt.errors import InputError, run_script  # noqa: E402
from nanogpt.evaluation import evaluate  # noqa: E402

CHARACTER, FAST = "config/train_shakespeare_char.py", "config/train_shakespeare_fast_gpu.py"
# With --trial the same commands on a CPU, small enough to end soon.
TRIAL = "--device=cpu --compile=False --block_size=32 --batch_size=4 --n_layer=1 --n_head=2 --n_embd=32 --eval_iters=2"

# Over FAST, each within the 5,000 steps of 16,384 tokens and the 10.6M parameters of nanoGPT's run.
BUDGET = {"tokens": 5000 * 64 * 256, "parameters": 10_646_784}
VARIANTS = [
    f"--max_iters={steps} --dropout={dropout} --muon_lr={rate} --weight_decay={decay}"
    for steps, dropout, rate, decay in [
        *itertools.product((600, 1200), (0.2, 0.35), (5e-3,), (0.1,)),
        *itertools.product((1200, 2500), (0.45,), (5e-3, 1e-2), (0.1,)),
        *itertools.product((1200, 2500), (0.45,), (5e-3,), (0.5, 1.0)),
        (1200, 0.35, 2.5e-3, 0.1),
        (2500, 0.55, 5e-3, 0.1),
        (5000, 0.5, 2.5e-3, 0.3),
    ]
]
SOFT_TARGETS = "--ngram_targets=5"
VARIANTS += [f"{VARIANTS[i]} --look_back=True{soft}" for i in (0, 1, 4, 6) for soft in ("", f" {SOFT_TARGETS}")]

# Five minutes of nanoGPT's recipe on one GPU, its batch a fifth, its warm-up and decay fitted to the run's length:
# with half a million tokens a step the run would be over before its warm-up.
BOOKS_NANOGPT = (
    "--batch_size=24 --gradient_accumulation_steps=4 --block_size=1024 --warmup_iters=100 --learning_rate=6e-4 "
    "--min_lr=6e-5 --weight_decay=0.1 --eval_iters=40 --log_interval=10"
)
BOOKS_OURS = (
    "config/train_gpt2_modern.py --batch_size=32 --gradient_accumulation_steps=4 --warmup_iters=30 "
    "--eval_interval=0 --eval_iters=0 --eval_train=False --sample_chars=0"
)


@dataclass
class MeasureConfig:
    """The stages to run."""

    stages: str = key("attention", "stages to run, in order, separated by commas")
    reference: str = key("", "nanoGPT checkout with data/shakespeare_char prepared; its code is executed")
    books: str = key("", "archive of .txt files")
    seconds: int = key(300, "seconds of nanoGPT's training on the books", ge=1)
    only: str = key("", "rows of the table whose names contain this")
    trial: bool = key(False, "run everything small and on a CPU; the numbers mean nothing")
    to: str = key(str(HERE), "folder for the results")


def main() -> None:
    config, _ = parse(MeasureConfig, description="Measure on a GPU.")
    stages = {f.__name__: f for f in (attention, deterministic, levers, table, decode, character, best, books)}
    names = config.stages.split(",")
    if unknown := [name for name in names if name not in stages]:
        raise InputError(f"--stages={config.stages}: no stage {', '.join(unknown)}; the stages are {', '.join(stages)}")
    if {"table", "character", "books"} & set(names) and not (Path(config.reference) / "train.py").is_file():
        raise InputError(f"--reference={config.reference}: contains no train.py; give a nanoGPT checkout")
    if not config.trial and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device; --trial=True runs the stages on a CPU")
    Path(config.to).mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        results = stages[name](config)
        report = {"command": shlex.join(sys.argv), "commit": commit(ROOT), "device": device_name(config)}
        report |= {"torch": torch.__version__, "wall_s": round(time.perf_counter() - start, 1), "results": results}
        # A part of the table is a file of its own, so that the table can be measured in parts.
        suffix = f"-{re.sub(r'[^a-z0-9]+', '-', config.only.lower())}" if name == "table" and config.only else ""
        path = Path(config.to) / f"{name}{suffix}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(results, indent=1)[:6000]}", flush=True)
        print(f"{name}: {report['wall_s']} s, written {path}", flush=True)


def device_name(config: MeasureConfig) -> str:
    return "cpu, a trial" if config.trial else torch.cuda.get_device_name()


def device_type(config: MeasureConfig) -> str:
    return "cpu" if config.trial else "cuda"


# --- Single operations and steps


def attention(config: MeasureConfig) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward by torch's kernels: medians, alternating."""
    shapes = {"124M, 12 heads of 64": (32, 12, 1024, 64), "modern, 6 heads of 128": (32, 6, 1024, 128)}
    shapes |= {"characters, 6 heads of 64": (64, 6, 256, 64), "1558M, 25 heads of 64": (4, 25, 1024, 64)}
    kernels = {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION], "torch's choice": None}
    if config.trial:
        shapes = {"tiny": (1, 2, 64, 16)}
        kernels = {"math": [SDPBackend.MATH], "torch's choice": None}
    results: dict[str, dict[str, float]] = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if config.trial else torch.bfloat16
        q, k, v = (torch.randn(shape, device=device_type(config), dtype=dtype, requires_grad=True) for _ in range(3))
        times: dict[str, list[float]] = {kernel: [] for kernel in kernels}
        for number in range(13):
            for kernel, backends in kernels.items():
                start = synchronized_time(config)
                with sdpa_kernel(backends) if backends else contextlib.nullcontext():
                    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                y.backward(y.detach())
                if number >= 3:  # after the warmup
                    times[kernel].append(1000 * (synchronized_time(config) - start))
        results[name] = {kernel: round(statistics.median(t), 4) for kernel, t in times.items()}
    return results


def synchronized_time(config: MeasureConfig) -> float:
    if not config.trial:
        torch.cuda.synchronize()
    return time.perf_counter()


def deterministic(config: MeasureConfig) -> dict[str, float]:
    """Milliseconds of a step of 124M parameters, deterministic and not, alternating."""
    size = "--batch_size=32"
    if config.trial:
        size = "--n_layer=1 --n_head=2 --n_embd=64 --block_size=64 --batch_size=2 --vocab_size=65 --device=cpu"
    names = ("False", "True", "False again", "True again")
    return {name: measure_step(f"{size} --steps=10 --deterministic={name.split()[0]}")["ms"] for name in names}


def levers(config: MeasureConfig) -> dict[str, dict[str, float]]:
    """Milliseconds and memory of a step of the fast recipe; seconds until the first one is done."""
    results = {}
    for mode in ("False",) if config.trial else ("True", "False"):
        for soft in ("", SOFT_TARGETS):
            flags = f"{FAST} {TRIAL if config.trial else f'--compile={mode}'} {soft} --look_back=True --steps=100"
            row = measure_step(flags)
            results[f"compile={mode} {soft}".strip()] = {key: row[key] for key in ("ms", "memory", "first_step_s")}
    return results


def measure_step(flags: str) -> dict[str, Any]:
    """The row of bench.py about our step."""
    with tempfile.TemporaryDirectory() as folder:
        run(shlex.split(f"bench.py {flags} --to={folder}/bench.json"), ROOT)
        return json.loads(Path(folder, "bench.json").read_text())["rows"][0]


# --- Whole programs


def table(config: MeasureConfig) -> Any:
    """The report of bench.py."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--reference={Path(config.reference).resolve()}", f"--only={config.only}"]
        flags += ["--device=cpu", "--steps=1", "--warmup=2"] if config.trial else []
        _, lines = run(["bench.py", "--table=True", f"--to={folder}/table.json", *flags], ROOT)
        print("\n".join(line for _, line in lines), flush=True)
        return json.loads(Path(folder, "table.json").read_text())


def decode(config: MeasureConfig) -> Any:
    """The report of runs/decode/measure.py."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--device=cuda", "--sizes=124M,1558M", "--batches=1,64", "--tokens=50"]
        if config.trial:
            flags = ["--contexts=20", "--batches=1", "--tokens=5", "--rounds=1"]
        _, lines = run(["runs/decode/measure.py", f"--to={folder}/decode.json", *flags], ROOT)
        print("\n".join(line for _, line in lines), flush=True)
        return json.loads(Path(folder, "decode.json").read_text())


def character(config: MeasureConfig) -> dict[str, Any]:
    """nanoGPT's documented run, then two of ours by the fast recipe: whole processes, three rounds."""
    rounds = []
    trial = f" {TRIAL} --max_iters=20 --eval_interval=10" if config.trial else ""
    for number in range(1 if config.trial else 3):
        with tempfile.TemporaryDirectory() as folder:
            wall_s, lines = run(
                shlex.split(f"train.py {CHARACTER}{trial} --out_dir={folder}/nanogpt"), Path(config.reference)
            )
            evaluations = [(seconds, float(m[3])) for seconds, line in lines if (m := EVALUATION.search(line))]
            best_s, best_loss = min(evaluations, key=lambda pair: pair[1])
            steps = [float(m[1]) for _, line in lines if (m := re.search(r"time ([\d.]+)ms", line))]
            nanogpt = {"wall_s": wall_s, "best_loss": best_loss, "best_after_s": best_s}
            nanogpt |= {"ms_per_step": statistics.median(steps), "evaluations": evaluations}
            ours = []
            for seed in (2 * number + 1, 2 * number + 2):
                flags = f"train.py {FAST}{trial} --eval_interval=0 --eval_iters=0 --eval_train=False --sample_chars=0"
                wall_s, lines = run(shlex.split(f"{flags} --seed={seed} --out_dir={folder}/ours-{seed}"), ROOT)
                last = json.loads(Path(folder, f"ours-{seed}/metrics.jsonl").read_text().splitlines()[-1])
                ours.append({"wall_s": wall_s, "loop_s": last["time_s"], "val_loss": last["val_loss"], "seed": seed})
                ours[-1]["first_step"] = next((line for _, line in lines if line.startswith("first step")), None)
            rounds.append({"nanogpt": nanogpt, "ours": ours})
            print(json.dumps(rounds[-1]), flush=True)
    pairs = [(r["nanogpt"], o) for r in rounds for o in r["ours"]]
    return {
        "time of nanoGPT's best evaluation over our whole process": [a["best_after_s"] / b["wall_s"] for a, b in pairs],
        "its whole process over ours": [a["wall_s"] / b["wall_s"] for a, b in pairs],
        "our losses over the whole split": [b["val_loss"] for _, b in pairs],
        "rounds": rounds,
    }


def best(config: MeasureConfig) -> list[dict[str, Any]]:
    """The lowest validation loss of each variant over the whole split, best first.

    Four variants run at once, so their times mean nothing.
    """
    trial = f" {TRIAL} --max_iters=20 --eval_interval=10" if config.trial else ""
    quiet = "--eval_iters=0 --eval_interval=100 --eval_train=False --sample_chars=0"

    def run_variant(variant: str, folder: str) -> dict[str, Any]:
        flags = f"train.py {FAST} {variant} {quiet}{trial}"
        out_dir = Path(folder, hashlib.sha256(variant.encode()).hexdigest()[:8])
        try:
            _, lines = run([*shlex.split(flags), f"--out_dir={out_dir}"], ROOT)
        except InputError as error:
            return {"variant": variant, "val_loss": float("inf"), "error": str(error)[:300]}
        evals = [
            json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines() if "val_loss" in line
        ]
        lowest = min(evals, key=lambda record: record["val_loss"])
        parameters = next(int(m[1].replace(",", "")) for _, t in lines if (m := re.search(r"([\d,]+) parameters", t)))
        assert parameters <= BUDGET["parameters"]
        assert evals[-1]["tokens"] <= BUDGET["tokens"]
        result = {
            "variant": variant,
            "val_loss": lowest["val_loss"],
            "at_step": lowest["step"],
            "parameters": parameters,
        }
        print(json.dumps(result), flush=True)
        return result | {"last": evals[-1]["val_loss"]}

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1 if config.trial else 4) as pool:
        chosen = [VARIANTS[0], VARIANTS[-1]] if config.trial else VARIANTS
        return sorted(
            pool.map(lambda variant: run_variant(variant, folder), chosen), key=lambda result: result["val_loss"]
        )


def books(config: MeasureConfig) -> dict[str, Any]:
    """Train by nanoGPT's recipe for `seconds`, and by ours for several lengths, to see which reaches its loss."""
    prepare_books(Path(config.books), Path(config.reference), 3 if config.trial else 0)
    trial = f" {TRIAL} --gradient_accumulation_steps=1" if config.trial else ""
    with tempfile.TemporaryDirectory() as folder:
        # First measure how many steps fit into the time: its schedule has to know the run's end.
        flags = f"train.py --dataset=books {BOOKS_NANOGPT}{trial}"
        tried = f"{flags} --max_iters=30 --lr_decay_iters=30 --eval_interval=1000 --eval_iters=1 --log_interval=1"
        _, lines = run(shlex.split(f"{tried} --out_dir={folder}/try"), Path(config.reference))
        times = [float(m[1]) / 1000 for _, line in lines if (m := re.search(r"time ([\d.]+)ms", line))]
        quarter = int((5 if config.trial else config.seconds) / statistics.median(times[10:]) / 4)
        steps = 4 * quarter  # it saves at evaluations, so also at the end
        flags += f" --max_iters={steps} --lr_decay_iters={steps} --eval_interval={quarter}"
        wall_s, lines = run(shlex.split(f"{flags} --out_dir={folder}/nanogpt"), Path(config.reference))
        nanogpt = {"steps": steps, "wall_s": wall_s, "val_loss": whole_split(Path(folder, "nanogpt"), config)}
        nanogpt["train_s"] = steps * statistics.median(times[10:])
        print(json.dumps(nanogpt), flush=True)
        ours = []
        for tokens in (20e6, 30e6, 40e6) if not config.trial else (2e3,):
            length = f"--max_iters={int(tokens / (32 * 4 * 1024)) if not config.trial else 10}"
            out_dir = Path(folder, f"ours-{tokens:.0f}")
            flags = f"train.py {BOOKS_OURS} --dataset=books {length}{trial} --out_dir={out_dir}"
            if config.trial:
                flags += " --head_dim=16"
            wall_s, _ = run(shlex.split(flags), ROOT)
            last = json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])
            ours.append({"flags": length, "wall_s": wall_s, "train_s": last["time_s"], "val_loss": last["val_loss"]})
            print(json.dumps(ours[-1]), flush=True)
    reached = [o["train_s"] for o in ours if o["val_loss"] <= nanogpt["val_loss"]]
    sooner = nanogpt["train_s"] / min(reached) if reached else None
    return {"nanogpt": nanogpt, "ours": ours, "training seconds over ours, the shortest run below its loss": sooner}


def prepare_books(archive: Path, reference: Path, count: int) -> None:
    """Encode the first `count` books (0: all) in GPT-2's tokens for both programs, the last twentieth held out."""
    folder = ROOT / "data" / "books"
    if not (folder / "train.bin").exists():
        with tarfile.open(archive) as tar:
            members = sorted((m for m in tar.getmembers() if m.name.endswith(".txt")), key=lambda m: m.name)
            members = members[:count] if count else members
            texts = [file.read().decode("utf-8", "replace") for m in members if (file := tar.extractfile(m))]
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as text:
            text.write("\n\n".join(texts))
            text.flush()
            run(["data/shakespeare/prepare.py", f"--input={text.name}", f"--out={folder}"], ROOT)
    theirs = reference / "data" / "books"
    theirs.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        (theirs / name).write_bytes((folder / name).read_bytes())


def whole_split(out_dir: Path, config: MeasureConfig) -> float:
    """The loss of nanoGPT's saved weights over the whole validation split, as our runs evaluate it."""
    model = GPT.from_pretrained(out_dir / "ckpt.pt").to(device_type(config))
    world = distributed.start(device_type(config), "auto")
    T = model.config.block_size
    tokens = open_dataset(ROOT / "data" / "books", block_size=T).val
    windows = EvalWindows(tokens, T, 0, 1, model.config.vocab_size)
    return evaluate(model, windows, 8, world)


if __name__ == "__main__":
    run_script(main)
