"""Compare runs: validation loss at equal steps, tokens and seconds, as a table and a picture.

    python compare.py out-a out-b out-c --out=compare.png

Runs that differ only in their seed are repeats: they share a row and a curve, mean ± standard error. For runs trained
with --log_layers=True the picture also shows the gradient and update norms of each layer.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from configurator import key, parse
from nanogpt.errors import InputError, raise_problems, run_script
from nanogpt.files import read_json, regular_file_size
from nanogpt.schema import Count, Limits, check

AXES = {"step": "steps", "tokens": "tokens", "time_s": "seconds"}
EVAL_FIELDS = (*AXES, "val_loss", "train_loss", "val_bpb")
STEP_FIELDS = ("step", "tokens", "time_s", "loss")
NORMS = {"layer_grad_norms": "gradient norm of a layer", "layer_update_norms": "update norm of a layer"}
GRID = np.array([0.25, 0.5, 0.75, 1.0])  # rows of the table, as fractions of the shortest run
MAX_LABEL_SETTINGS = 5  # a longer label would not be read
STYLE: Any = {"axes.grid": True, "grid.color": "0.9", "axes.spines.top": False, "axes.spines.right": False}

# Keys that do not change what a run learns: names, logging, saving.
KEYS_WITHOUT_EFFECT = {
    *("seed", "out_dir", "resume", "dry_run", "eval_only", "eval_interval", "log_interval", "sample_chars"),
    *("wandb_log", "wandb_project", "wandb_run_name", "tensorboard"),
    *("always_save_checkpoint", "checkpoint_minutes", "keep_every", "log_layers", "verify_data"),
    *("eval_train", "timeout_s", "new_data", "device", "backend", "shards"),
    *("activation_checkpointing", "loss_chunk", "deterministic"),
}
# The values of keys that checkpoints of version 0.1 lack.
ADDED_LATER: dict[str, Any] = {
    "gelu": "tanh",
    "qk_norm": True,
    "look_back": False,
    "ngram_targets": 0,
    "lora_rank": 0,
    "lora_alpha": 32.0,
    "lora_targets": "attention,mlp",
}
# Keys that --minutes derives from measured speed and free memory, so repeats may differ in them.
MEASURED_KEYS = {"max_iters", "decay_iters", "eval_iters", "micro_batch_size"}


@dataclass
class CompareConfig:
    runs: list[str] = key(..., "folders of the runs (their out_dir)")
    out: str = key("compare.png", "file for the picture")


# The lines of metrics.jsonl that are read. Limits: beyond them matplotlib cannot draw.
Number = Annotated[float, Limits(ge=-1e38, le=1e38)] | None


class Position(TypedDict):
    step: Count
    tokens: Count
    time_s: Annotated[float, Limits(ge=0, le=1e12)]


class Evaluation(Position):
    val_loss: Number
    train_loss: NotRequired[Number]
    val_bpb: NotRequired[Number]


class Update(Position):
    loss: Number


class LayerNorms(TypedDict):
    step: Count
    layer_grad_norms: dict[str, Number]
    layer_update_norms: dict[str, Number]


# Kinds of lines by the field that marks them.
LINES: dict[str, Any] = {
    "val_loss": Evaluation,
    "loss": Update,
    "layer_grad_norms": LayerNorms,
}


@dataclass
class Run:
    path: Path
    settings: dict[str, Any] | None  # None: no readable checkpoint
    evals: dict[str, np.ndarray]  # for each of EVAL_FIELDS one value per evaluation, NaN where unknown
    steps: dict[str, np.ndarray]  # the same for STEP_FIELDS, one value per logged step
    layer_norms: list[dict[str, Any]]  # lines of metrics.jsonl that hold the NORMS


@dataclass
class Group:
    label: str
    runs: list[Run]


def main(argv: Sequence[str] | None = None) -> None:
    config, _ = parse(CompareConfig, argv, "Compare runs by their validation losses.", positional="runs")
    runs = []
    problems = []
    paths: dict[str, Path] = {}
    for path in map(Path, config.runs):
        paths.setdefault(os.path.realpath(path), path)
    for path in paths.values():
        try:
            runs.append(read_run(path))
        except InputError as error:
            problems.append(str(error))
    raise_problems(problems)

    groups = group_repeats(runs)
    print(format_table(groups))
    draw_picture(groups, config.out)
    print(f"\npicture: {config.out}")


def read_run(path: Path) -> Run:
    """Read the evaluations, layer norms and settings of the run in folder `path`.

    Raises InputError if metrics.jsonl is missing or damaged or holds no evaluation.
    """
    file = path / "metrics.jsonl"
    try:
        regular_file_size(file)
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{file}: {(error.strerror or 'unreadable').lower()}; give the out_dir of a run") from None

    records: dict[str, list[dict[str, Any]]] = {name: [] for name in LINES}
    for number, line in enumerate(lines, 1):
        record: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line.strip() or b"{}")
        if record is None and number == len(lines):
            break  # the last line of a live or killed run may be incomplete
        _, problems = check(record, dict[str, Any])
        if not problems:
            for name in LINES.keys() & record.keys():
                checked, line_problems = check(record, LINES[name])
                records[name].append(checked)
                problems += line_problems
        if problems:
            raise InputError(f"{file}:{number}: damaged line ({problems[0]}); remove it or restore the file")
    if not records["val_loss"]:
        raise InputError(f"{file}: no evaluation yet; wait for the run's first one")

    evals = {field: _column(records["val_loss"], field) for field in EVAL_FIELDS}
    steps = {field: _column(records["loss"], field) for field in STEP_FIELDS}
    for axis in AXES:
        if min(np.diff(evals[axis]).min(initial=0), np.diff(steps[axis]).min(initial=0)) < 0:
            raise InputError(f"{file}: {axis} goes back, as in a file of two runs; separate their lines")
    return Run(path, _read_settings(path), evals, steps, records["layer_grad_norms"])


def _column(records: list[dict[str, Any]], field: str) -> np.ndarray:
    """A field of all records, null and missing as NaN."""
    return np.array([record.get(field) for record in records], dtype=float)


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Read a run's settings from its newest checkpoint; None if there is none or it is damaged."""
    states = [file for file in path.glob("ckpt/step-*/state.json") if file.parent.name[5:].isdigit()]
    try:
        newest = max(states, key=lambda file: int(file.parent.name[5:]))
        return ADDED_LATER | read_json(newest)["config"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def group_repeats(runs: Sequence[Run]) -> list[Group]:
    """Group the runs whose settings differ in keys without effect, the seed among them.

    A group's label lists the settings that distinguish it, or its first folder if they are none, unknown or too many.
    """
    ignored = set(KEYS_WITHOUT_EFFECT)
    if all(run.settings and run.settings.get("minutes") for run in runs):
        ignored |= MEASURED_KEYS

    known = [run.settings for run in runs if run.settings is not None]
    names = dict.fromkeys(name for settings in known for name in settings if name not in ignored)
    differing = [name for name in names if len({json.dumps(settings.get(name)) for settings in known}) > 1]

    repeats: dict[tuple[str, int], list[Run]] = {}
    copies: Counter[tuple[str, Any]] = Counter()
    for run in runs:
        label = str(run.path)
        seed = None
        if run.settings is not None:
            label = " ".join(f"{name}={run.settings.get(name)}" for name in differing)
            seed = run.settings.get("seed")
        repeats.setdefault((label, copies[label, seed]), []).append(run)  # a group has each seed once
        copies[label, seed] += 1

    folders = Counter(run.path.resolve().name for run in runs)
    groups = []
    for (label, copy), members in repeats.items():
        folder = members[0].path.resolve().name
        folder = folder if folders[folder] == 1 else str(members[0].path)
        if members[0].settings is None or not 0 < len(differing) <= MAX_LABEL_SETTINGS:
            label = folder
        elif copy or (label, 1) in repeats:
            label += f" {folder}"
        if len(members) > 1:
            label += f" ({len(members)} runs)"
        groups.append(Group(label, members))
    return groups


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first dimension, the runs; the error of a single run is NaN."""
    if len(values) == 1:
        return values[0], np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / len(values) ** 0.5


def mean_loss(group: Group, axis: str, x: np.ndarray, field: str = "val_loss") -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of a group at points x of an axis, (len(x),) each.

    Interpolates linearly between evaluations; NaN where a run of the group has none on both sides.
    """
    losses = [np.interp(x, run.evals[axis], run.evals[field], left=np.nan, right=np.nan) for run in group.runs]
    return mean_and_error(np.stack(losses))


def format_table(groups: Sequence[Group]) -> str:
    """Validation losses at equal steps, tokens and seconds, then the best loss of each group."""
    rows = []
    for axis in AXES:
        rows += [*_loss_rows(groups, axis), [""]]
    rows += _best_rows(groups)
    label_width = max(len(row[0]) for row in rows)
    cell_width = max(len(cell) for row in rows for cell in row[1:]) + 2
    lines = [label.ljust(label_width) + "".join(cell.rjust(cell_width) for cell in cells) for label, *cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def _loss_rows(groups: Sequence[Group], axis: str) -> list[list[str]]:
    grid = GRID * min(run.evals[axis][-1] for group in groups for run in group.runs)
    grid = np.unique(grid if axis == "time_s" else grid.round())
    amount = "{:,.1f}" if axis == "time_s" else "{:,.0f}"
    rows = [[f"validation loss at equal {AXES[axis]}", *map(amount.format, grid)]]
    for group in groups:
        rows.append([group.label, *map(_format_loss, *mean_loss(group, axis, grid))])
    return rows


def _best_rows(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["best validation loss", "loss", "at step", "bits per byte"]]
    for group in groups:
        best = []
        for run in group.runs:
            losses = run.evals["val_loss"]
            index = np.where(np.isnan(losses), np.inf, losses).argmin()
            best.append([run.evals[field][index] for field in ("val_loss", "val_bpb", "step")])
        mean, error = mean_and_error(np.array(best))
        steps = sorted({int(step) for _, _, step in best})
        at_step = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        rows.append([group.label, _format_loss(mean[0], error[0]), at_step, _format_loss(mean[1], error[1])])
    return rows


def _format_loss(mean: float, error: float) -> str:
    if np.isnan(mean):
        return "–"
    digits = ".4f" if mean < 1e5 else ".4g"
    return f"{mean:{digits}}" if np.isnan(error) else f"{mean:{digits}} ±{error:{digits}}"


def draw_picture(groups: Sequence[Group], out: str) -> None:
    """Write the loss curves of all groups, and below them the layer norms of each run that logged them."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('matplotlib is not installed, so there is no picture; run pip install -e ".[plots]"') from None

    with_norms = [run for group in groups for run in group.runs if run.layer_norms]
    legend_height = 0.25 * math.ceil(len(groups) / 3)
    heights = [4.4 + legend_height] + [3.6] * len(with_norms)
    picture = Figure(figsize=(13, sum(heights)), layout="constrained")
    losses, *norms = picture.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    with rc_context(STYLE):
        draw_losses(losses, groups)
        for run, figure in zip(with_norms, norms, strict=True):
            draw_layer_norms(figure, run)

    try:
        picture.savefig(out, dpi=120, format=Path(out).suffix[1:] or "png")  # else a name without suffix gets one
    except (OSError, ValueError) as error:
        raise InputError(f"--out={out}: {error}; give a writable path that ends in .png, .svg or .pdf") from None


def _plain(text: str) -> str:
    """A label that matplotlib draws as it is: no $formula$, not hidden by a leading underscore, valid Unicode."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw_losses(figure: Any, groups: Sequence[Group]) -> None:
    """Draw a panel for each axis, of validation loss (bold) and training loss (thin)."""
    from matplotlib.ticker import EngFormatter

    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, unit) in zip(panels, AXES.items(), strict=True):
        for number, group in enumerate(groups):
            x = np.unique(np.concatenate([run.evals[axis] for run in group.runs]))
            if len(x) > 10:
                x = x[x >= 0.05 * x[-1]]  # the steep drop of the first steps would flatten the rest
            val, error = mean_loss(group, axis, x)
            train, _ = mean_loss(group, axis, x, "train_loss")
            color = f"C{number % 10}"
            panel.plot(x, val, color=color, linewidth=2, marker=".", label=_plain(group.label))
            panel.fill_between(x, val - error, val + error, color=color, alpha=0.2, linewidth=0)
            if np.isnan(train).all():  # --eval_train=False, or a time budget: the logged losses of the steps instead
                x, train = group.runs[0].steps[axis], group.runs[0].steps["loss"]
                train = train[x >= 0.05 * x.max(initial=0)]
                x = x[x >= 0.05 * x.max(initial=0)]
            panel.plot(x, train, color=color, linewidth=0.8, alpha=0.7)
        panel.set(xlabel=unit, xlim=(0, None))
        if axis == "tokens":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100M instead of 1e8
    panels[0].set_ylabel("loss: validation bold, training thin")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(3, len(groups)), frameon=False)


def draw_layer_norms(figure: Any, run: Run) -> None:
    """Draw two panels, gradient and update norms: a line per layer, from the first (dark) to the last (light).

    Ticks above the x axis mark the logged steps before which updates were clipped.
    """
    from matplotlib import colormaps

    steps = [record["step"] for record in run.layer_norms]
    clipped = [record["step"] for record in run.layer_norms if record.get("clipped")]
    panels = figure.subplots(1, len(NORMS))
    for panel, (field, label) in zip(panels, NORMS.items(), strict=True):
        layers = list(run.layer_norms[-1][field])
        for number, layer in enumerate(layers):
            norms = np.array([record[field].get(layer) for record in run.layer_norms], dtype=float)
            color = colormaps["viridis"](0.9 * number / max(len(layers) - 1, 1))
            panel.plot(steps, norms, color=color, linewidth=1, label=_plain(layer))
        bottom = [0.02] * len(clipped)
        panel.plot(clipped, bottom, "|", color="C3", transform=panel.get_xaxis_transform(), label="clipped")
        panel.set(xlabel="steps", ylabel=label, yscale="log")
    figure.suptitle(_plain(run.path.resolve().name), fontsize="medium")
    columns = math.ceil(len(layers) / 14)
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small", ncols=columns)


if __name__ == "__main__":
    run_script(main)
