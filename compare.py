"""Runs side by side: a table of validation losses at equal steps, tokens and seconds, and a picture of the curves.

    python compare.py out-a out-b out-c --out=compare.png

Runs that differ in their seed alone are repeats: they become one row and one curve, mean ± standard error. Below stand
the norms of the layers' gradients and updates, of runs that have logged them (--log_layers=True).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import InputError, run_script

AXES = {"step": "steps", "tokens": "tokens", "time_s": "seconds"}
MOST_SETTINGS = 5  # that a label names
NORMS = {"layer_grad_norms": "norm of a layer's gradient", "layer_update_norms": "norm of a layer's update"}
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
# What a run is called, shows and keeps does not change what it learns.
UNCOUNTED = {
    *("seed", "out_dir", "resume", "dry_run", "eval_only", "eval_interval", "log_interval", "sample_chars"),
    *("wandb_log", "wandb_project", "wandb_run_name", "tensorboard"),
    *("always_save_checkpoint", "checkpoint_minutes", "keep_every", "log_layers", "verify_data"),
}
CLOCKED = {"max_iters", "decay_iters", "eval_iters", "micro_batch_size"}  # as time and memory have it, with --minutes


@dataclass
class Run:
    path: Path
    settings: dict[str, Any] | None  # None where no checkpoint tells them
    evals: dict[str, np.ndarray]  # step tokens time_s train_loss val_loss val_bpb, one value an evaluation
    layered: list[dict[str, Any]]  # its lines that tell the norms of layers


@dataclass
class Group:
    label: str
    runs: list[Run]


def read_run(path: Path) -> Run:
    """The evaluations and the settings of the run in a folder. Raises InputError if they are missing or damaged."""
    file = path / "metrics.jsonl"
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{file}: {(error.strerror or 'unreadable').lower()}; give the out_dir of a run") from None
    layered = []
    evals: dict[str, list[float]] = {name: [] for name in (*AXES, "train_loss", "val_loss", "val_bpb")}
    for number, line in enumerate(lines, 1):
        try:
            record = {"train_loss": None, "val_bpb": None} | json.loads(line)  # which not every run tells
            if set(NORMS) <= record.keys():
                layered.append(record)
            if "val_loss" in record:
                values = [np.nan if record[name] is None else float(record[name]) for name in evals]
                for column, value in zip(evals.values(), values, strict=True):
                    column.append(value)
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # a run that goes on, or was killed, may leave half a line
                break
            raise InputError(f"{file}:{number}: damaged line; remove it or restore the file") from None
    if not evals["step"]:
        raise InputError(f"{file}: no evaluation yet; wait for the run's first one")
    return Run(path, _settings(path), {name: np.array(column) for name, column in evals.items()}, layered)


def _settings(path: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint says of the run's settings."""
    states = [file for file in path.glob("ckpt/step-*/state.json") if file.parent.name[5:].isdigit()]
    for state in sorted(states, key=lambda file: int(file.parent.name[5:]), reverse=True):
        try:
            return dict(json.loads(state.read_bytes())["config"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None


def group_repeats(runs: Sequence[Run]) -> list[Group]:
    """Repeats together, each group labeled with the settings that tell it from the others; with its folder where there
    are none, or so many that nobody would read them."""
    groups: dict[str, list[Run]] = {}
    uncounted = UNCOUNTED | (CLOCKED if all((run.settings or {}).get("minutes") for run in runs) else set())
    for run in runs:
        counted = {name: value for name, value in (run.settings or {}).items() if name not in uncounted}
        same = json.dumps(counted, sort_keys=True) if run.settings is not None else f"folder {run.path}"
        groups.setdefault(same, []).append(run)
    known = [members[0].settings for members in groups.values() if members[0].settings is not None]
    names = dict.fromkeys(name for settings in known for name in settings if name not in uncounted)
    differing = [name for name in names if len({json.dumps(s.get(name, "unset")) for s in known}) > 1]
    labeled = []
    if len(differing) > MOST_SETTINGS:
        differing = []
    for members in groups.values():
        settings = members[0].settings
        parts = [f"{name}={settings.get(name, 'unset')}" for name in differing] if settings is not None else []
        count = f" ({len(members)} runs)" if len(members) > 1 else ""
        labeled.append(Group((" ".join(parts) or members[0].path.resolve().name) + count, members))
    return labeled


def interpolate(run: Run, axis: str, at: np.ndarray, what: str = "val_loss") -> np.ndarray:
    """The loss at points of an axis, on straight lines between evaluations; NaN outside of them."""
    return np.interp(at, run.evals[axis], run.evals[what], left=np.nan, right=np.nan)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first dimension, the runs, and its standard error: NaN for a single run."""
    n = len(values)
    error = values.std(axis=0, ddof=1) / n**0.5 if n > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), error


def curve(group: Group, axis: str, what: str = "val_loss") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and standard error over the stretch of the axis that all runs of a group have covered."""
    points = [run.evals[axis] for run in group.runs]
    x = np.unique(np.concatenate(points))
    x = x[(x >= max(p[0] for p in points)) & (x <= min(p[-1] for p in points))]
    return x, *mean_and_error(np.stack([interpolate(run, axis, x, what) for run in group.runs]))


def common_grid(groups: Sequence[Group], axis: str) -> np.ndarray:
    """A few points of an axis that every run has reached; the last is where the shortest run ends."""
    end = min(run.evals[axis][-1] for group in groups for run in group.runs)
    points = end * np.array(FRACTIONS)
    return np.unique(points if axis == "time_s" else points.round())


def table(groups: Sequence[Group]) -> str:
    """Validation losses at equal steps, tokens and seconds, then the best of each."""
    blocks = []
    for axis, unit in AXES.items():
        grid = common_grid(groups, axis)
        losses = [np.stack([interpolate(run, axis, grid) for run in group.runs]) for group in groups]
        seen = np.isfinite(np.concatenate(losses)).any(axis=0)  # by any: a short run may be evaluated at its end alone
        rows = [[f"validation loss at equal {unit}", *(_amount(x, axis) for x in grid[seen])]]
        for group, found in zip(groups, losses, strict=True):
            mean, error = mean_and_error(found[:, seen])
            rows.append([group.label, *(_loss(*pair) for pair in zip(mean.tolist(), error.tolist(), strict=True))])
        blocks.append(rows)
    rows = [["best validation loss", "loss", "at step", "bits per byte"]]
    for group in groups:
        best = np.array([_best(run) for run in group.runs])
        (loss, _, bpb), errors = mean_and_error(best)
        low, high = best[:, 1].min(), best[:, 1].max()
        at_step = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
        rows.append([group.label, _loss(loss, errors[0]), at_step, "" if np.isnan(bpb) else _loss(bpb, errors[2])])
    blocks.append(rows if any(row[3] for row in rows[1:]) else [row[:3] for row in rows])
    first = max(len(row[0]) for rows in blocks for row in rows)
    others = max(len(cell) for rows in blocks for row in rows for cell in row[1:]) + 2
    lines = [[row[0].ljust(first) + "".join(cell.rjust(others) for cell in row[1:]) for row in rows] for rows in blocks]
    return "\n\n".join("\n".join(block) for block in lines)


def _best(run: Run) -> list[float]:
    """The best loss, its step, and its bits per byte, NaN where nothing tells them."""
    losses = run.evals["val_loss"]
    at = int(np.where(np.isnan(losses), np.inf, losses).argmin())
    return [run.evals[name][at] for name in ("val_loss", "step", "val_bpb")]


def _loss(mean: float, error: float) -> str:
    return f"{mean:.4f}" + ("" if np.isnan(error) else f" ±{error:.4f}")


def _amount(x: float, axis: str) -> str:
    return f"{x:,.1f}" if axis == "time_s" else f"{x:,.0f}"


def draw(groups: Sequence[Group], out: Path) -> None:
    """Three panels, one an axis: validation loss (bold) and training loss (thin) of every group. Below them a row for
    each run that has logged its layers."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise InputError("no picture without matplotlib; install it with: pip install -e .[plots]") from None
    legend_rows, layered = -(-len(groups) // 3), [run for group in groups for run in group.runs if run.layered]
    heights = [4.4 + 0.25 * legend_rows, *[3.6] * len(layered)]
    whole = Figure(figsize=(13, sum(heights)), layout="constrained")
    figure, *rows = whole.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for run, row in zip(layered, rows, strict=True):
        draw_layers(run, row)
    panels = figure.subplots(1, 3, sharey=True)
    seen = []
    for panel, (axis, unit) in zip(panels, AXES.items(), strict=True):
        for number, group in enumerate(groups):
            color = f"C{number % 10}"
            x, mean, error = curve(group, axis)
            panel.plot(x, mean, color=color, linewidth=2, label=group.label)
            panel.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
            panel.plot(*curve(group, axis, "train_loss")[:2], color=color, linewidth=0.8, alpha=0.7)
            seen += [loss[x >= 0.05 * x[-1]] for loss in (mean, curve(group, axis, "train_loss")[1]) if len(x)]
        panel.set_xlabel(f"{unit} of training" if axis == "time_s" else unit)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    # The fall from a random network's loss would flatten all that follows: the picture starts after it.
    shown = np.concatenate(seen)
    shown = shown[np.isfinite(shown)]
    if len(shown) and np.ptp(shown) > 0:
        panels[0].set_ylim(shown.min() - 0.05 * np.ptp(shown), shown.max() + 0.05 * np.ptp(shown))
    panels[0].set_ylabel("loss: validation bold, training thin")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(groups)), frameon=False)
    try:
        whole.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"--out={out}: {error}; give a writable path that ends in .png, .svg or .pdf") from None


def draw_layers(run: Run, figure: Any) -> None:
    """Two panels, of gradients and of updates: a line a layer, from the first (dark) to the last (light), and marks on
    the axis at the steps since which updates were clipped."""
    from matplotlib import colormaps

    panels, steps = figure.subplots(1, 2), [line["step"] for line in run.layered]
    clipped = [line["step"] for line in run.layered if line.get("clipped")]
    for panel, (what, label) in zip(panels, NORMS.items(), strict=True):
        layers = list(run.layered[-1][what])
        for number, layer in enumerate(layers):
            norms = [np.nan if (x := line[what].get(layer)) is None else x for line in run.layered]
            color = colormaps["viridis"](0.9 * number / max(len(layers) - 1, 1))
            panel.plot(steps, norms, color=color, linewidth=1, label=layer)
        panel.plot(
            clipped, [0.02] * len(clipped), "|", color="C3", transform=panel.get_xaxis_transform(), label="clipped"
        )
        panel.set(xlabel="steps", ylabel=label, yscale="log")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(run.path.resolve().name, fontsize="medium")
    panels[1].legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small", ncols=-(-len(layers) // 14)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare runs by their validation losses.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="out_dir of a run")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: %(default)s)")
    options = parser.parse_args(argv)
    runs, faults = [], []
    for path in dict.fromkeys(options.runs):
        try:
            runs.append(read_run(path))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    groups = group_repeats(runs)
    print(table(groups))
    draw(groups, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    run_script(main)
