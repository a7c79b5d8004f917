"""Everything that is to be measured on one GPU, stage by stage, each into a file of its own beside this one:

    python runs/gpu/measure.py --reference=NANOGPT_CHECKOUT --stages=checks,attention,table,decode,character,best,books

The checkout needs data/shakespeare_char prepared; `books` needs --books=books.tar.xz, any archive of .txt files.
--trial=True goes through all of it on a CPU in some minutes, to see that it works; its figures mean nothing.

checks      what only a GPU can prove: graphs = no graphs, resume to the bit, no waiting in a step, float32 = a CPU's
attention   flash against cuDNN, forward and backward, at the shapes that matter
table       bench.py --table=True beside nanoGPT (ask for --stages=table --only=… where time is short)
decode      tokens/s of writing, at batch 1 and 64, 124M and 1558M, beside transformers and the memory's limit
character   whole processes: nanoGPT's documented run of 10.6M parameters, and its loss by our fast recipe
best        the lowest loss on tiny Shakespeare within that run's tokens and parameters: one line a variant
books       nanoGPT's recipe for 124M parameters on books for five minutes, and its loss by the modern recipe

Predictions, written before the first run: 124M at 62% of the matrix peak and 1.35 times nanoGPT; cuDNN 1.2 times flash;
graphs 1.4 times at 10.6M parameters; Muon 2% of a step of half a million tokens; the loss 1.4697 in a twelfth of
nanoGPT's time; best loss 1.41; the books' loss three times sooner. Decoding at batch 1: 15% of the memory's limit at
124M, 45% at 1558M, three times transformers; at batch 64 twice.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
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

from bench import BenchConfig, training_steps  # noqa: E402
from configurator import build, key, parse  # noqa: E402
from load import MODEL_KEYS  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanogpt import (  # noqa: E402
    compile,
    distributed,
    optim,
)
from nanogpt.data.dataset import open_dataset  # noqa: E402
from nanogpt.data.rows import EvalWindows  # noqa: E402
from nanogpt.distributed import World  # noqa: E402
from nanogpt.errors import InputError, run_script  # noqa: E402
from nanogpt.evaluation import evaluate  # noqa: E402
from train import TrainConfig  # noqa: E402

CHARACTER, FAST = "config/train_shakespeare_char.py", "config/train_shakespeare_fast_gpu.py"
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 16, "vocab_size": 65}
# On a CPU the same commands, small enough to end soon.
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
    """What to measure."""

    stages: str = key("checks,attention", "which, in order, with commas between")
    reference: str = key("", "a nanoGPT checkout with data/shakespeare_char prepared; its code is executed")
    books: str = key("", "an archive of .txt files")
    seconds: int = key(300, "of nanoGPT's training on the books", ge=1)
    only: str = key("", "the rows of the table whose names hold this")
    trial: bool = key(False, "everything small and on a CPU; the figures mean nothing")
    to: str = key(str(HERE), "folder of the results")


def main() -> None:
    config, _ = parse(MeasureConfig, description="Measure on a GPU.")
    stages = {f.__name__: f for f in (checks, attention, table, decode, character, best, books)}
    asked = config.stages.split(",")
    if unknown := [name for name in asked if name not in stages]:
        raise InputError(f"stages={config.stages}: no {', '.join(unknown)}; there are {', '.join(stages)}")
    if {"table", "character", "books"} & set(asked) and not (Path(config.reference) / "train.py").is_file():
        raise InputError(f"reference={config.reference}: there is no train.py in it; give a nanoGPT checkout")
    if not config.trial and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; --trial=True goes through the stages on a CPU")
    Path(config.to).mkdir(parents=True, exist_ok=True)
    for name in asked:
        start = time.perf_counter()
        found = stages[name](config)
        facts = {"command": shlex.join(sys.argv), "commit": commit(ROOT), "device": device_name(config)}
        facts |= {"torch": torch.__version__, "wall_s": round(time.perf_counter() - start, 1)}
        # The table takes the name of what was asked for, so that it can be measured in parts.
        part = f"{name}-{re.sub(r'[^a-z0-9]+', '-', config.only.lower())}" if name == "table" and config.only else name
        path = Path(config.to) / f"{part}.json"
        path.write_text(json.dumps(facts | {"results": found}, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(found, indent=1)[:6000]}\n{name}: {facts['wall_s']} s, written {path}", flush=True)


def device_name(config: MeasureConfig) -> str:
    return "cpu, a trial" if config.trial else torch.cuda.get_device_name()


def on(config: MeasureConfig) -> str:
    return "cpu" if config.trial else "cuda"


# ---- checks


def checks(config: MeasureConfig) -> dict[str, Any]:
    """Each check's outcome: True, or what was found instead. One that raises does not keep the others from running."""
    found: dict[str, Any] = {}
    steps = (same_as_cpu, graphs_change_nothing, nobody_waits, muon_is_torchs)
    for check in (*steps, resumes_to_the_bit, deterministic_costs, memory_ends):
        try:
            found[check.__name__] = check(config)
        except Exception as error:
            found[check.__name__] = f"{type(error).__name__}: {error}"[:500]
    return found


def same_as_cpu(config: MeasureConfig) -> dict[str, float]:
    """The largest difference of logits and of gradients from the CPU's in float32, relative to the largest."""
    torch.set_float32_matmul_precision("highest")
    found = {}
    for arch in ("gpt2", "modern"):
        shape = GPTConfig(n_layer=3, n_head=4, n_embd=128, block_size=256, vocab_size=500, bias=False, arch=arch)
        idx, sides = torch.randint(500, (4, 256)), []
        model = GPT(shape)
        for device in ("cpu", on(config)):
            model.zero_grad(set_to_none=True)
            logits, loss = model.to(device)(idx.to(device), idx.to(device))
            loss.backward()
            sides.append((logits.cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
        for name, cpu, other in zip(("logits", "gradients"), *sides, strict=True):
            found[f"{arch} {name}"] = ((cpu - other).abs().max() / cpu.abs().max()).item()
    return found


def losses(config: MeasureConfig, steps: int, graphs: bool, **keys: Any) -> list[float]:
    """Of so many steps of a small model by the program's own step."""

    settings = build(
        BenchConfig, SMALL | {"gradient_accumulation_steps": 1, "device": on(config)} | keys, source="here"
    )
    world = distributed.start(settings.device, settings.dtype)
    torch.manual_seed(1)
    sizes = {name: getattr(settings, name) for name in MODEL_KEYS}
    model = GPT(GPTConfig(vocab_size=settings.vocab_size, dropout=settings.dropout, **sizes))
    tokens = torch.randint(65, (100_000,)).numpy().astype("uint16")
    kept, compile.GRAPHS_BELOW = compile.GRAPHS_BELOW, 1e18 if graphs else 0.0
    made = training_steps(settings, model, tokens, world)
    found = [loss for _ in range(steps) for loss in next(made)]
    compile.GRAPHS_BELOW = kept
    return found


def graphs_change_nothing(config: MeasureConfig) -> dict[str, Any]:
    """Losses with and without CUDA graphs, dropout on, and how long their steps take."""
    keys = {"dropout": 0.2, "compile": not config.trial, "optimizer": "muon", "arch": "modern"}
    plain, replayed = (losses(config, 30, graphs, **keys) for graphs in (False, True))
    return {"equal": plain == replayed, "largest difference": max(map(abs, map(float.__sub__, plain, replayed)))}


def nobody_waits(config: MeasureConfig) -> bool:
    """Whether a step waits for the device nowhere: torch raises where something does."""
    if config.trial:
        return True
    settings = build(BenchConfig, SMALL | {"gradient_accumulation_steps": 2, "compile": False}, source="here")
    world = distributed.start("cuda", "auto")
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=128, vocab_size=65, bias=False))
    made = training_steps(settings, model, torch.randint(65, (100_000,)).numpy().astype("uint16"), world)
    for _ in range(3):
        next(made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def muon_is_torchs(config: MeasureConfig) -> float:
    """The largest difference of weights from torch.optim.Muon's after ten steps, relative to how far they went."""
    device = torch.device(on(config))
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=65, bias=False)).to(device)
    settings = TrainConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.1)
    ours = optim.Optimizer(model, settings, World(0, 1, device, torch.bfloat16))
    name = "blocks.0.mlp.up.weight"
    weight = dict(model.named_parameters())[name]
    twin, began = weight.detach().clone().requires_grad_(), weight.detach().clone()
    theirs = torch.optim.Muon([twin], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        twin.grad = weight.grad.clone()
        ours.step(1.0, one, zero)
        theirs.step()
    return ((weight - twin).abs().max() / (weight - began).abs().max()).item()


def resumes_to_the_bit(config: MeasureConfig) -> bool:
    """Twelve steps at once, and the same with a stop after five, end in the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{CHARACTER} --deterministic=True --dropout=0.1 --max_iters=12 --eval_iters=2 --sample_chars=0"
        flags += f" --lr_decay_iters=12 --eval_interval=5 {TRIAL if config.trial else ''}"
        run([*shlex.split(f"train.py {flags}"), f"--out_dir={folder}/whole"], ROOT)
        run([*shlex.split(f"train.py {flags}"), "--max_iters=5", f"--out_dir={folder}/cut"], ROOT)
        run(["train.py", f"--out_dir={folder}/cut", "--resume=True", "--max_iters=12"], ROOT)
        hashes = {
            hashlib.sha256(Path(folder, name, "ckpt/step-000012/model.safetensors").read_bytes()).hexdigest()
            for name in ("whole", "cut")
        }
    return len(hashes) == 1


def deterministic_costs(config: MeasureConfig) -> dict[str, float]:
    """A step of 124M parameters with equal bits each time, over one without: milliseconds, twice in turn."""
    times: dict[str, float] = {}
    size = (
        "--n_layer=1 --n_head=2 --n_embd=64 --block_size=64 --batch_size=2 --vocab_size=65 --device=cpu"
        if config.trial
        else "--batch_size=32"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in ("False", "True", "False again", "True again"):
            flags = f"bench.py {size} --steps=10 --deterministic={name.split()[0]} --to={folder}/bench.json"
            run(shlex.split(flags), ROOT)
            times[name] = json.loads(Path(folder, "bench.json").read_text())["rows"][0]["ms"]
    return times


def memory_ends(config: MeasureConfig) -> str:
    """What a user reads whose micro-batch does not fit, and the exit status."""
    flags = "--dataset=shakespeare_char --batch_size=100000 --gradient_accumulation_steps=1 --block_size=1024"
    command = [sys.executable, "train.py", *shlex.split(flags), "--max_iters=2", "--compile=False", "--out_dir=none"]
    done = subprocess.run([*command, f"--device={on(config)}"], cwd=ROOT, capture_output=True, text=True)
    return f"status {done.returncode}: {done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else ''}"


# ---- attention


def attention(config: MeasureConfig) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward by torch's kernels: medians, in turn."""
    shapes = {"124M, 12 heads of 64": (32, 12, 1024, 64), "modern, 6 heads of 128": (32, 6, 1024, 128)}
    shapes |= {"characters, 6 heads of 64": (64, 6, 256, 64), "1558M, 25 heads of 64": (4, 25, 1024, 64)}
    kernels = {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION], "torch's choice": None}
    if config.trial:
        shapes, kernels = {"tiny": (1, 2, 64, 16)}, {"math": [SDPBackend.MATH], "torch's choice": None}
    found: dict[str, dict[str, float]] = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if config.trial else torch.bfloat16
        q, k, v = (torch.randn(shape, device=on(config), dtype=dtype, requires_grad=True) for _ in range(3))
        times: dict[str, list[float]] = {kernel: [] for kernel in kernels}
        for turn in range(13):
            for kernel, allowed in kernels.items():
                start = moment(config)
                if allowed:
                    with sdpa_kernel(allowed):
                        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                else:
                    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                y.backward(y.detach())
                if turn >= 3:
                    times[kernel].append(1000 * (moment(config) - start))
        found[name] = {kernel: round(statistics.median(t), 4) for kernel, t in times.items()}
    return found


def moment(config: MeasureConfig) -> float:
    if not config.trial:
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- whole programs


def table(config: MeasureConfig) -> Any:
    """bench.py's table, as it writes it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--reference={Path(config.reference).resolve()}", f"--only={config.only}"]
        flags += ["--device=cpu", "--steps=1", "--warmup=2"] if config.trial else []
        _, lines = run(["bench.py", "--table=True", f"--to={folder}/table.json", *flags], ROOT)
        print("\n".join(line for _, line in lines), flush=True)
        return json.loads(Path(folder, "table.json").read_text())


def decode(config: MeasureConfig) -> Any:
    """runs/decode/measure.py's comparison, as it writes it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--device=cuda", "--sizes=124M,1558M", "--batches=1,64", "--tokens=50"]
        if config.trial:
            flags = ["--contexts=20", "--batches=1", "--tokens=5", "--rounds=1"]
        _, lines = run(["runs/decode/measure.py", f"--to={folder}/decode.json", *flags], ROOT)
        print("\n".join(line for _, line in lines), flush=True)
        return json.loads(Path(folder, "decode.json").read_text())


def character(config: MeasureConfig) -> dict[str, Any]:
    """nanoGPT's documented run, then ours by the fast recipe, whole processes, three rounds of one and two."""
    rounds = []
    trial = f" {TRIAL} --max_iters=20 --eval_interval=10" if config.trial else ""
    for number in range(1 if config.trial else 3):
        with tempfile.TemporaryDirectory() as folder:
            wall_s, lines = run(
                shlex.split(f"train.py {CHARACTER}{trial} --out_dir={folder}/nanogpt"), Path(config.reference)
            )
            seen = [(seconds, float(m[3])) for seconds, line in lines if (m := EVALUATION.search(line))]
            best_s, best_loss = min(seen, key=lambda pair: pair[1])
            steps = [float(m[1]) for _, line in lines if (m := re.search(r"time ([\d.]+)ms", line))]
            nanogpt = {"wall_s": wall_s, "best_loss": best_loss, "best_after_s": best_s}
            nanogpt |= {"ms_per_step": statistics.median(steps), "evaluations": seen}
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
    """Each variant's lowest validation loss over the whole split, best first. Four run at once, so no time is told."""
    trial = f" {TRIAL} --max_iters=20 --eval_interval=10" if config.trial else ""
    quiet = "--eval_iters=0 --eval_interval=100 --eval_train=False --sample_chars=0"

    def one(variant: str, folder: str) -> dict[str, Any]:
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
        chosen = VARIANTS[:2] if config.trial else VARIANTS
        return sorted(pool.map(lambda v: one(v, folder), chosen), key=lambda result: result["val_loss"])


def books(config: MeasureConfig) -> dict[str, Any]:
    """nanoGPT's recipe for `seconds` of training, and when ours, of a length of its own, is at that loss."""
    prepare_books(Path(config.books), Path(config.reference), 3 if config.trial else 0)
    trial = f" {TRIAL} --gradient_accumulation_steps=1" if config.trial else ""
    with tempfile.TemporaryDirectory() as folder:
        # How many steps fit into the time is measured first: its schedule has to know the run's end.
        flags = f"train.py --dataset=books {BOOKS_NANOGPT}{trial}"
        tried = f"{flags} --max_iters=30 --lr_decay_iters=30 --eval_interval=1000 --eval_iters=1 --log_interval=1"
        _, lines = run(shlex.split(f"{tried} --out_dir={folder}/try"), Path(config.reference))
        times = [float(m[1]) / 1000 for _, line in lines if (m := re.search(r"time ([\d.]+)ms", line))]
        quarter = int((5 if config.trial else config.seconds) / statistics.median(times[10:]) / 4)
        steps = 4 * quarter  # it saves where it evaluates, so at the end too
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
    """The books in GPT-2's encoding, in name order, the last twentieth held out, for both programs; count: 0 = all."""
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
    """The validation loss of nanoGPT's saved weights over all full windows, as our runs evaluate themselves."""
    model = GPT.from_pretrained(out_dir / "ckpt.pt").to(on(config))
    world = distributed.start(on(config), "auto")
    T = model.config.block_size
    tokens = open_dataset(ROOT / "data" / "books", block_size=T).val
    windows = EvalWindows(tokens, T, 0, 1, model.config.vocab_size)

    return evaluate(model, windows, 8, world)


if __name__ == "__main__":
    run_script(main)
