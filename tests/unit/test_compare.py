"""compare.py: means and interpolations worked out by hand, repeats grouped, damaged files named."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from compare import (
    ADDED_LATER,
    KEYS_WITHOUT_EFFECT,
    NORMS,
    Group,
    draw_layer_norms,
    format_table,
    group_repeats,
    main,
    mean_loss,
    read_run,
)
from nanogpt.errors import InputError
from nanogpt.files import read_json
from train import TrainConfig

MakeRun = Callable[..., Path]
EVALUATION: dict[str, Any] = {"step": 20, "tokens": 2000, "time_s": 20.0, "val_loss": 1.0}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name, losses, settings=None, seconds=1.0, tail=""):
        """A run evaluated every ten steps of 100 tokens and `seconds`; a training line before each evaluation."""
        run = tmp_path / name
        run.mkdir()
        lines = []
        for n, loss in enumerate(losses):
            position = {"step": 10 * n, "tokens": 1000 * n, "time_s": 10 * n * seconds}
            lines.append(json.dumps(position | {"loss": 9.9, "grad_norm": None}))
            lines.append(json.dumps(position | {"train_loss": 1.0, "val_loss": loss}))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
        if settings is not None:
            (run / "ckpt" / "step-000020").mkdir(parents=True)
            (run / "ckpt" / "step-000020" / "state.json").write_text(json.dumps({"config": settings}))
        return run

    return make


def test_mean_loss_interpolates_between_evaluations_only(make_run: MakeRun):
    group = Group("a", [read_run(make_run("a", [4.0, 3.0, None, 1.0], seconds=0.5))])
    for axis, x, expected in (
        ("step", [0, 5, 10, 30], [4.0, 3.5, 3.0, 1.0]),
        ("tokens", [250], [3.75]),
        ("time_s", [2.5], [3.5]),
        ("step", [-1, 15, 20, 31], [np.nan] * 4),  # before the start, beside a NaN, at it, past the end
    ):
        mean, error = mean_loss(group, axis, np.array(x))
        np.testing.assert_array_equal(mean, expected)
        assert np.isnan(error).all()


def test_runs_of_version_0_1_have_the_defaults_of_later_keys():
    run = ROOT / "tests/fixtures/v0_1/runs/modern_muon"
    saved = read_json(run / "ckpt/step-000010/state.json")["config"]
    later = {name: value for name, value in asdict(TrainConfig()).items() if name not in saved and value is not None}
    assert {name: value for name, value in later.items() if name not in KEYS_WITHOUT_EFFECT} == ADDED_LATER
    assert read_run(run).settings == ADDED_LATER | saved


BASE: dict[str, Any] = {"seed": 1, "out_dir": "a", "n_layer": 4, "dropout": 0.1, "n_head": 4}
TIMED = BASE | {"minutes": 1.0, "max_iters": 400, "decay_iters": 80, "eval_iters": 1}


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        (
            [BASE, BASE | {"n_layer": 6, "dropout": 0.0}, BASE | {"seed": 2, "wandb_run_name": "x"}, None],
            ["n_layer=4 dropout=0.1 (2 runs)", "n_layer=6 dropout=0.0", "run3"],
        ),
        ([TIMED, TIMED | {"seed": 2, "max_iters": 401}], ["run0 (2 runs)"]),
        ([BASE, BASE, BASE | {"seed": 2}, BASE], ["run0 (2 runs)", "run1", "run3"]),  # the same seed is no repeat
        ([BASE, BASE | {"n_head": 2}, BASE], ["n_head=4 run0", "n_head=2", "n_head=4 run2"]),
        ([BASE, BASE | {"seed": 2, "new_key": None}], ["run0 (2 runs)"]),
        ([BASE, BASE | {"seed": 2, "device": "cuda", "deterministic": True}], ["run0 (2 runs)"]),
        ([BASE | {"max_iters": 400}, BASE | {"max_iters": 401}], ["max_iters=400", "max_iters=401"]),
        ([BASE, BASE | dict.fromkeys("uvwxyz", 1)], ["run0", "run1"]),  # too many differences for a label
    ],
)
def test_group_repeats_labels_what_differs(make_run: MakeRun, settings: list[dict[str, Any] | None], labels: list[str]):
    runs = [read_run(make_run(f"run{k}", [4.0], each)) for k, each in enumerate(settings)]
    assert [group.label for group in group_repeats(runs)] == labels


@pytest.mark.parametrize(("newest", "expected"), [('{"config": {"n_layer": 3}}', 3), ('{"conf', None)])
def test_settings_come_from_the_newest_checkpoint(make_run: MakeRun, newest: str, expected: int | None):
    run = make_run("a", [4.0], {"n_layer": 2})
    for step, text in {"1000000": newest, "999999": "", "2000000.tmp": "{}"}.items():
        (run / "ckpt" / f"step-{step}").mkdir()
        (run / "ckpt" / f"step-{step}" / "state.json").write_text(text)
    assert (read_run(run).settings or {}).get("n_layer") == expected


def test_table_compares_up_to_the_end_of_the_shortest_run(make_run: MakeRun):
    best = '{"step": 50, "tokens": 5000, "time_s": 12.5, "val_loss": 0.5, "val_bpb": 0.25}\n'  # no train_loss
    runs = [
        read_run(make_run("a", [4.0, 2.0, 3.0], {"n_layer": 2, "seed": 1})),
        read_run(make_run("b", [4.0, 3.0, 2.0], {"n_layer": 2, "seed": 2})),
        read_run(make_run("c", [4.0, 3.0, 2.0, 1.0, None], {"n_layer": 3}, seconds=0.25, tail=best)),
    ]
    rows = [
        [cell.strip() for cell in line.split("  ") if cell] for line in format_table(group_repeats(runs)).splitlines()
    ]
    two, three = "n_layer=2 (2 runs)", "n_layer=3"
    by_steps = [
        [two, "3.2500 ±0.2500", "2.5000 ±0.5000", "2.5000 ±0.0000", "2.5000 ±0.5000"],
        [three, "3.5000", "3.0000", "2.5000", "2.0000"],
    ]
    assert rows == [
        ["validation loss at equal steps", "5", "10", "15", "20"],
        *by_steps,
        [],
        ["validation loss at equal tokens", "500", "1,000", "1,500", "2,000"],
        *by_steps,
        [],
        ["validation loss at equal seconds", "3.1", "6.2", "9.4", "12.5"],
        [two, "3.5312 ±0.1562", "3.0625 ±0.3125", "2.5938 ±0.4688", "2.5000 ±0.2500"],
        [three, "2.7500", "1.5000", "–", "0.5000"],
        [],
        ["best validation loss", "loss", "at step", "bits per byte"],
        [two, "2.0000 ±0.0000", "10 to 20", "–"],
        [three, "0.5000", "50", "0.2500"],
    ]


def test_read_run_forgives_an_incomplete_last_line(make_run: MakeRun):
    run = read_run(make_run("a", [4.0, 3.0], tail='{"step": 20, "val_'))
    assert run.evals["val_loss"].tolist() == [4.0, 3.0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"step": 20, "val_', r":3: damaged line"),
        ('{"step": 20, "val_loss": 1.0}', r":3: damaged line"),
        ("[1]", r":3: damaged line"),
        (json.dumps(EVALUATION | {"step": 10**400}), r":3: damaged line \(step: expected a whole number"),
        (json.dumps(EVALUATION | {"time_s": -1.0}), r":3: damaged line \(time_s: must be at least 0"),
        (json.dumps(EVALUATION | {"val_loss": 1e300}), r":3: damaged line \(val_loss: must be at most 1e\+38"),
        (json.dumps(EVALUATION | {name: [1] for name in NORMS}), r":3: damaged line \(layer_grad_norms: expected an"),
        (json.dumps(EVALUATION) + "\n" + json.dumps(EVALUATION | {"step": 10}), "step goes back, as in a file of two"),
    ],
)
def test_lines_that_cannot_be_compared_are_named(make_run: MakeRun, line: str, problem: str):
    with pytest.raises(InputError, match=rf"metrics\.jsonl.*{problem}"):
        read_run(make_run("a", [4.0], tail=line + '\n{"step": 30}\n'))


def test_a_run_counts_once_by_whatever_path(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("compare.draw_picture", lambda *_: None)
    run = make_run("a", [4.0, 3.0], BASE)
    (tmp_path / "link").symlink_to(run)
    main([str(run), f"{run}/", str(tmp_path / "link")])
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows.count(["a", "3.0000"]) == 1


def test_main_names_every_unreadable_run(make_run: MakeRun, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        main([str(tmp_path / "nowhere"), str(make_run("a", [4.0])), str(make_run("empty", []))])
    missing, empty = str(caught.value).splitlines()
    assert "nowhere" in missing
    assert "empty" in empty


def test_picture_of_one_evaluation_and_of_nan(make_run: MakeRun, tmp_path: Path):
    pytest.importorskip("matplotlib")
    runs = [str(make_run("a", [4.0])), str(make_run("b", [4.0, None, 3.0])), str(make_run("c", [None]))]
    main([*runs, f"--out={tmp_path / 'x.png'}"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"--out=.*\.png, \.svg or \.pdf"):
        main([*runs, f"--out={tmp_path / 'x.docx'}"])
    main([*runs, f"--out={tmp_path / 'picture'}"])
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")  # under its own name, without a suffix
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.filterwarnings("error")
def test_picture_labels_are_the_names(make_run: MakeRun, tmp_path: Path):
    """Also those that matplotlib takes for formulas, or hides."""
    pytest.importorskip("matplotlib")
    names = ["_hidden", "$x^{$", "a\udcffb"]
    norms = {name: {"_layer$_$": 0.5} for name in NORMS}
    runs = [str(make_run(name, [4.0, 3.0], tail=json.dumps({"step": 10} | norms) + "\n")) for name in names]
    main([*runs, f"--out={tmp_path / 'x.svg'}"])
    comments = re.findall("<!-- (.*) -->", (tmp_path / "x.svg").read_text())
    seen = [comments.count(label) for label in (" _hidden", "$x^{$", "a\\udcffb", " _layer$_$")]
    assert seen == [2, 2, 2, 3]  # in the legend and above the norms; of the layer in the legend of each run's norms


def test_picture_has_a_row_for_layer_norms(make_run: MakeRun, tmp_path: Path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    norms = {field: {"embedding": 0.5, "norm": None} for field in NORMS}
    tail = "".join(json.dumps({"step": step, "clipped": step > 3} | norms) + "\n" for step in (3, 6))
    logged = make_run("a", [4.0, 3.0], tail=tail)
    draw_layer_norms(figure, read_run(logged))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["embedding"] == [[3, 0.5], [6, 0.5]]
    assert [x for x, _ in lines["clipped"]] == [6]

    plain = make_run("b", [4.0])
    heights = []
    for runs in ([logged, plain], [plain]):
        main([*map(str, runs), f"--out={tmp_path / 'x.png'}"])
        heights.append(int.from_bytes((tmp_path / "x.png").read_bytes()[20:24], "big"))  # of the PNG header
    assert heights[0] > 1.5 * heights[1]


def test_table_prints_without_matplotlib(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[plots\]"'):
        main([str(make_run("a", [4.0, 3.0]))])
    assert "validation loss at equal steps" in capsys.readouterr().out
