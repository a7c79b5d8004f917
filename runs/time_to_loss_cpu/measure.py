"""The time to nanoGPT's loss: config/train_shakespeare_fast_cpu.py against nanoGPT's documented run for a CPU.

    python runs/time_to_loss_cpu/measure.py --reference=PATH_OF_A_NANOGPT_CHECKOUT
    python runs/time_to_loss_cpu/measure.py --reference=… --text=BOOK.txt --target=0
    python runs/time_to_loss_cpu/measure.py --reference=… --before=CHECKOUT_OF_AN_EARLIER_COMMIT

Alternates whole processes, from start to exit, the last evaluation included. The recipes differ in network, optimizer
and batch; the text, the validation windows and the machine are the same. Writes results.json (with --text the book's
name instead of "results") beside itself.
"""

import json
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]

import compare_with_nanogpt  # noqa: E402
from compare_with_nanogpt import NANOGPT_FLAGS, commit, machine, read_nanogpt, run  # noqa: E402

from configurator import key, parse  # noqa: E402
from nanogpt.data.dataset import open_dataset  # noqa: E402
from nanogpt.errors import InputError, run_script  # noqa: E402

RECIPE = "config/train_shakespeare_fast_cpu.py"
LENGTH = "--max_iters=2000 --lr_decay_iters=2000"


@dataclass
class MeasureConfig:
    """The runs to measure."""

    reference: str = key("", "nanoGPT checkout with data/shakespeare_char prepared; its code is executed")
    rounds: int = key(3, "runs of nanoGPT, each followed by its share of ours", ge=1)
    seeds: int = key(5, "our runs, with seeds from 1", ge=1)
    target: float = key(1.89, "loss over the whole validation split to reach; 0: the median of nanoGPT's")
    text: str = key("", "text instead of tiny Shakespeare")
    ours: str = key("", "more flags for our train.py")
    before: str = key("", "checkout of an earlier commit, whose own fast recipe runs before each of ours")
    to: str = key(str(HERE), "folder for the results")


def main() -> None:
    config, _ = parse(MeasureConfig, description="Measure the time to a loss.")
    reference = Path(config.reference).resolve()
    if not config.reference or not (reference / "train.py").is_file():
        raise InputError(f"--reference={config.reference}: contains no train.py; give a nanoGPT checkout")
    dataset = "shakespeare_char"
    if config.text:
        dataset = prepare(Path(config.text), reference)
        compare_with_nanogpt.DATASET = dataset  # whose validation split its whole_split_loss reads
    elif not (ROOT / "data" / dataset / "meta.json").is_file():
        raise InputError(f"{dataset} is not prepared: run python data/{dataset}/prepare.py")
    theirs = f"train.py config/train_shakespeare_char.py {NANOGPT_FLAGS} {LENGTH} --dataset={dataset}"
    ours = f"train.py {RECIPE} --dataset={dataset} {config.ours}".strip()
    print(f"nanoGPT: python {theirs}\nours: python {ours} --seed=N", flush=True)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, seeds in enumerate(np.array_split(np.arange(1, config.seeds + 1), config.rounds)):
            out_dir = Path(folder) / f"nanogpt-{number}"
            wall_s, lines = run([*shlex.split(theirs), f"--out_dir={out_dir}"], reference)
            read = read_nanogpt(out_dir, lines)
            times = [float(match[1]) for _, line in lines if (match := re.search(r"time ([\d.]+)ms", line))]
            # It prints the time of an evaluation with that of its step, so the median step stands for all.
            loop_s = 2000 * read["ms_per_step"] / 1000
            rounds.append({"nanogpt": {"wall_s": round(wall_s, 2), "loop_s": round(loop_s, 2), **read}, "ours": []})
            print(f"round {number + 1}: {rounds[-1]['nanogpt']}, {len(times)} steps timed", flush=True)
            for seed in seeds:
                flags = [f"--seed={seed}", f"--out_dir={folder}/ours-{seed}"]
                result = {"seed": int(seed), **run_ours([*shlex.split(ours), *flags], ROOT)}
                if config.before:
                    flags = [
                        f"--dataset={ROOT / 'data' / dataset}",
                        f"--seed={seed}",
                        f"--out_dir={folder}/before-{seed}",
                    ]
                    result["before"] = run_ours(["train.py", RECIPE, *flags], Path(config.before))
                rounds[-1]["ours"].append(result)
                print(f"round {number + 1}: {result}", flush=True)
    target = config.target or float(np.median([r["nanogpt"]["val_loss"] for r in rounds]))
    summary = summarize(rounds, target)
    report = {
        "commands": {"nanogpt": f"python {theirs}", "ours": f"python {ours} --seed=N"},
        "settings": asdict(config)
        | {
            "reference": commit(reference),
            "before": commit(Path(config.before)),
            "to": None,
            "text": Path(config.text).name,
        },
        "notes": [
            "wall_s: the whole process. loop_s: ours its training without evaluation and saving, nanoGPT's 2,000 times "
            "its median printed step.",
            "val_loss: ours as the run itself printed it at its end, over the whole validation split in windows of 64; "
            "nanoGPT's that of the weights it saved, over the same windows.",
            "ratios: nanoGPT's time of the round over each of ours.",
        ],
        "machine": machine(),
        "summary": summary,
        "rounds": rounds,
    }
    path = Path(config.to) / (f"{Path(config.text).stem}.json" if config.text else "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1), f"written: {path}", sep="\n")


def run_ours(command: list[str], checkout: Path) -> dict[str, Any]:
    """Run a train.py of ours, its --out_dir the last flag; return its seconds and its last loss."""
    wall_s, _ = run(command, checkout)
    out_dir = Path(command[-1].removeprefix("--out_dir="))
    last = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()][-1]
    return {"wall_s": round(wall_s, 2), "loop_s": last["time_s"], "val_loss": round(last["val_loss"], 5)}


def summarize(rounds: list[dict[str, Any]], target: float) -> dict[str, Any]:
    pairs = [(r["nanogpt"], ours) for r in rounds for ours in r["ours"]]
    ratios = {name: [a[name] / b[name] for a, b in pairs] for name in ("wall_s", "loop_s")}
    losses = [ours["val_loss"] for _, ours in pairs]
    before = [ours["before"]["wall_s"] / ours["wall_s"] for _, ours in pairs if "before" in ours]
    return {
        "target": target,
        "reached_by": f"{sum(loss <= target for loss in losses)} of {len(losses)}",
        "val_loss": {"ours": losses, "nanogpt": [r["nanogpt"]["val_loss"] for r in rounds]},
        **{
            f"{name}_ratio": {"median": round(float(np.median(r)), 2), "lowest": round(min(r), 2)}
            for name, r in ratios.items()
        },
        "wall_s_ratio_before": round(float(np.median(before)), 2) if before else None,
    }


def prepare(text: Path, reference: Path) -> str:
    """Make a character dataset of the text for both programs; return its name under their data/."""
    name = "time_to_loss_text"
    command = [sys.executable, "data/shakespeare_char/prepare.py", f"--input={text.resolve()}", f"--out=data/{name}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    folder = ROOT / "data" / name
    theirs = reference / "data" / name
    theirs.mkdir(exist_ok=True)
    tokenizer = open_dataset(folder, block_size=64).tokenizer
    assert tokenizer
    itos = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (theirs / "meta.pkl").write_bytes(pickle.dumps(meta))
    for split in ("train.bin", "val.bin"):
        (theirs / split).write_bytes((folder / split).read_bytes())
    return name


if __name__ == "__main__":
    run_script(main)
