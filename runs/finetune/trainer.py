"""A step's time and memory beside transformers' Trainer, on the same rows: python runs/finetune/trainer.py

    python runs/finetune/trainer.py --init_from=model.gguf --dataset=data/shakespeare_smollm2
    python runs/finetune/trainer.py --init_from=model.gguf --dataset=data/lighthouse_smollm2 \\
        --config=config/finetune_smollm2_chat.py --to=runs/finetune/trainer_chat.json

Both fine-tune the same weights with AdamW, the same rates and clipping, as whole processes in turn. The Trainer has its
defaults, and all rows of a step in one pass. The losses of the steps must agree. In conversations only the answers
count, and both attend to whole rows.
Prediction, before the first run: 1.15 times the speed, since both spend their time in the same matrix products; 0.75 of
the memory, for the logits of all tokens. Conversations: 1.15 times, since ours computes logits only where a target
counts, and they are a fifth of the arithmetic.
Outcome in float32, three pairs each: 1.37 and 1.43 times the speed, 0.88 and 0.86 of the memory. A day before, on the
same kind of machine, 0.97 and 1.15: probably the Trainer's page faults, two million more in six steps, cost less there.
Since the MLP's activation is computed again in backward: 0.78 of the memory; another day 1.05 and 1.21 times the speed.
On a Xeon with AMX, plays: 1.24 times the speed in float32 and 1.43 in bfloat16, 0.78 and 0.80 of the memory. There was
no prediction for bfloat16; a first run gave 1.31 and 0.84, after which attention and the chunked loss were changed.
Since norms keep bfloat16 for backward: 0.77 of the memory in bfloat16, as computed before, at 1.60 times the speed in a
calm hour (float32: 0.80 and 1.06).
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command that prints JSON in its last line."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """The process's peak so far: after the last step it includes loading, and no checkpoint."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run_ours(recipe: str, init_from: str, dataset: str, steps: int, dtype: str) -> None:
    """train.py in this process, and the times between its steps."""
    import train

    with tempfile.TemporaryDirectory() as folder:
        keys = {"init_from": init_from, "dataset": dataset, "out_dir": f"{folder}/out", "max_iters": steps}
        keys |= {
            "dtype": dtype,
            "eval_interval": 0,
            "eval_iters": 1,
            "log_interval": 1,
            "sample_chars": 0,
            "decay_lr": False,
            "mask_documents": False,
        }
        times: list[float] = []
        peaks: list[float] = []
        plain_step = train.train_step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            stats = plain_step(*args, **kwargs)
            times.append(time.perf_counter() - start)
            peaks.append(peak_mb())
            return stats

        train.train_step = timed_step
        sys.argv = ["train.py", recipe, *(f"--{name}={value}" for name, value in keys.items())]
        train.main()
        lines = [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(json.dumps({"seconds": times, "losses": losses, "peak_mb": peaks[-1]}))


def run_trainer(model: str, rows: str, rate: float, rows_per_step: int, dtype: str) -> None:
    """The Trainer in this process, on the inputs and targets in a file."""
    import torch
    import transformers

    x, y = torch.load(rows)
    y[y < 0] = -100  # ignored by the Trainer's loss
    times = [time.perf_counter()]
    losses: list[float] = []
    peaks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())
            peaks.append(peak_mb())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=rows_per_step,
            max_steps=len(x) // rows_per_step,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            bf16=dtype == "bfloat16",
        )
        trainer = transformers.Trainer(
            transformers.AutoModelForCausalLM.from_pretrained(model),
            settings,
            # Labels of their own place, since ours have a target for the last token too.
            train_dataset=[{"input_ids": x[i], "labels": y[i], "shift_labels": y[i]} for i in range(len(x))],
            callbacks=[Clock()],
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(x)  # the rows in our order
        trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(times)]
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_mb": peaks[-1]}))


def write_rows(config: Any, path: str, steps: int) -> None:
    """Save the inputs and targets, each (rows, T), of our first steps."""
    import torch

    from nanogpt.data.dataset import open_dataset
    from nanogpt.data.rows import Rows

    dataset = open_dataset(config.dataset, block_size=config.block_size)
    rows = Rows(dataset.train, config.block_size, dataset.vocab_size, config.seed, config.row_order, None)
    torch.save(rows[0 : steps * config.rows_per_step], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--config", default="config/finetune_smollm2.py")
    parser.add_argument("--to", type=Path, default=HERE / "trainer.json")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--dtypes", default="float32", help="in turn: float32, the Trainer's default, and bfloat16, its autocast"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from compare_with_nanogpt import machine

    from configurator import parse
    from train import TrainConfig

    sys.argv = ["train.py", arguments.config, f"--dataset={arguments.dataset.resolve()}"]
    config, _ = parse(TrainConfig, description="")
    dtypes = arguments.dtypes.split(",")
    report: dict[str, Any] = {"machine": machine()}
    report |= {dtype: {"ours": [], "trainer": []} for dtype in dtypes}
    with tempfile.TemporaryDirectory() as folder:
        export = [sys.executable, "export.py", f"--init_from={arguments.init_from}", f"--to={folder}/model"]
        subprocess.run(export, cwd=ROOT, check=True)
        write_rows(config, f"{folder}/rows.pt", arguments.steps)
        dataset = str(arguments.dataset.resolve())
        ours = ["ours", arguments.config, arguments.init_from, dataset, str(arguments.steps)]
        theirs = [
            "trainer",
            f"{folder}/model",
            f"{folder}/rows.pt",
            str(config.learning_rate),
            str(config.rows_per_step),
        ]
        for _, dtype in itertools.product(range(arguments.rounds), dtypes):
            for name, flags in (("ours", ours), ("trainer", theirs)):
                outcome = measure([sys.executable, __file__, *flags, dtype])
                outcome["step_s"] = statistics.median(outcome["seconds"][1:])
                report[dtype][name].append(outcome)
                print(dtype, name, outcome, flush=True)
    for dtype in dtypes:
        sides = report[dtype]
        pairs = list(zip(sides["ours"], sides["trainer"], strict=True))
        tolerance = 1e-4 if dtype == "float32" else 0.02
        for ours, theirs in pairs:
            assert all(abs(a - b) < tolerance for a, b in zip(ours["losses"], theirs["losses"], strict=True)), (
                "other rows"
            )
        sides["time_ratios"] = [theirs["step_s"] / ours["step_s"] for ours, theirs in pairs]
        sides["memory_ratios"] = [ours["peak_mb"] / theirs["peak_mb"] for ours, theirs in pairs]
        fast, memory = (statistics.median(sides[name]) for name in ("time_ratios", "memory_ratios"))
        print(f"{dtype}: times as fast: {fast:.2f}; of the memory: {memory:.2f}")
    arguments.to.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        run_ours(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6])
    elif sys.argv[1:2] == ["trainer"]:
        run_trainer(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        main()
