"""Draw assets/recipes.png, the README's picture, from the two runs in recipes/: python runs/time_to_loss_cpu/draw.py"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "assets" / "recipes.png"
CURVES = {  # run -> label, color, where the label stands (seconds, loss)
    "old": ("nanoGPT's recipe", "#6b7280", (33, 2.16)),
    "new": ("config/train_shakespeare_fast_cpu.py", "#d9480f", (4, 1.80)),
}


def main() -> None:
    plt.rcParams.update({"font.size": 19, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(11, 5.2), layout="constrained")
    for name, (label, color, at) in CURVES.items():
        lines = [json.loads(line) for line in (HERE / "recipes" / name / "metrics.jsonl").read_text().splitlines()]
        points = [(line["time_s"], line["val_loss"]) for line in lines if "val_loss" in line and line["step"] > 0]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=4)
        axes.plot(*points[-1], "o", color=color, markersize=10)
        axes.annotate(label, at, color=color, fontweight="bold")
    axes.set(xlabel="seconds of training on two CPU cores", ylabel="validation loss", xlim=(0, 64), ylim=(1.74, 2.75))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT, dpi=100)


if __name__ == "__main__":
    main()
