"""compare.py: means and interpolations worked out by hand, repeats found, damaged files named."""

import json
import sys

import numpy as np
import pytest

from compare import NORMS, common_grid, curve, draw_layers, group_repeats, interpolate, main, read_run, table
from nanogpt.errors import InputError


@pytest.fixture
def make_run(tmp_path):
    def make(name, losses, settings=None, every=10, seconds=1.0, tail=""):
        """A run evaluated at each `every` steps of 100 tokens and `seconds`; a training line before each evaluation."""
        run = tmp_path / name
        run.mkdir()
        lines = []
        for n, loss in enumerate(losses):
            at = {"step": n * every, "tokens": n * every * 100, "time_s": n * every * seconds}
            lines.append(json.dumps(at | {"loss": 9.9, "lr": 0.1, "grad_norm": None, "tokens_per_s": 5, "mfu": None}))
            lines.append(json.dumps(at | {"train_loss": 1.0, "val_loss": loss}))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
        if settings is not None:
            (run / "ckpt" / "step-000020").mkdir(parents=True)
            (run / "ckpt" / "step-000020" / "state.json").write_text(json.dumps({"config": settings}))
        return run

    return make


def test_interpolation_is_linear_between_evaluations_only(make_run):
    run = read_run(make_run("a", [4.0, 3.0, None, 1.0], seconds=0.5))
    assert interpolate(run, "step", np.array([0, 5, 10])).tolist() == [4.0, 3.5, 3.0]
    assert interpolate(run, "tokens", np.array([250])).tolist() == [3.75]
    assert interpolate(run, "time_s", np.array([2.5])).tolist() == [3.5]
    assert np.isnan(interpolate(run, "step", np.array([15, 20, 31]))).all()  # beside a NaN, and past the end
    assert interpolate(run, "step", np.array([30])).tolist() == [1.0]


def test_seeds_are_repeats_and_the_other_differences_the_legend(make_run):
    base = {"seed": 1, "out_dir": "a", "n_layer": 4, "dropout": 0.1, "n_head": 4}
    runs = [
        read_run(make_run("a", [4.0], base)),
        read_run(make_run("b", [4.0], base | {"n_layer": 6, "dropout": 0.0})),
        read_run(make_run("c", [4.0], base | {"seed": 2, "out_dir": "c", "wandb_run_name": "x"})),
        read_run(make_run("unknown", [4.0])),
    ]
    groups = group_repeats(runs)
    assert [group.label for group in groups] == [
        "n_layer=4 dropout=0.1 (2 runs)",
        "n_layer=6 dropout=0.0",
        "unknown",
    ]
    assert [run.path.name for run in groups[0].runs] == ["a", "c"]
    assert [group.label for group in group_repeats([runs[0], runs[2]])] == ["a (2 runs)"]
    timed = [
        {"minutes": 1.0, "max_iters": 400 + k, "decay_iters": 80 + k, "eval_iters": k, "seed": k} for k in range(2)
    ]
    pair = [read_run(make_run(f"timed{k}", [4.0], base | timed[k])) for k in range(2)]
    assert [group.label for group in group_repeats(pair)] == ["timed0 (2 runs)"]  # the clock's doing is no setting
    assert "max_iters=401" in group_repeats([*pair[1:], runs[0]])[0].label
    other = read_run(make_run("other", [4.0], base | dict.fromkeys("uvwxyz", 1)))
    assert [group.label for group in group_repeats([runs[0], other])] == ["a", "other"]  # too many to be read


def test_the_newest_readable_checkpoint_tells_the_settings(make_run):
    run = make_run("a", [4.0], {"n_layer": 2})
    for step, text in {
        "000010": '{"config": {"n_layer": 1}}',
        "1000000": '{"conf',
        "000030.tmp": '{"config": {}}',
    }.items():
        (run / "ckpt" / f"step-{step}").mkdir()
        (run / "ckpt" / f"step-{step}" / "state.json").write_text(text)
    assert read_run(run).settings == {"n_layer": 2}


def test_mean_and_standard_error_over_repeats(make_run):
    runs = [
        read_run(make_run("a", [4.0, 3.0, 2.0], {"seed": 1})),
        read_run(make_run("b", [4.0, 1.0], {"seed": 2}, every=20)),
    ]
    x, mean, error = curve(group_repeats(runs)[0], "step")
    # b is at 2.5 in step 10. The standard error of two values is half of their distance.
    assert x.tolist() == [0, 10, 20]
    assert mean.tolist() == [4.0, 2.75, 1.5]
    assert error == pytest.approx([0.0, 0.25, 0.5])


def test_table_compares_where_the_shortest_run_has_been(make_run):
    settings = {"n_layer": 2}
    groups = group_repeats(
        [
            read_run(make_run("a", [4.0, 2.0, 3.0], settings | {"seed": 1})),
            read_run(make_run("b", [4.0, 3.0, 2.0], settings | {"seed": 2})),
            read_run(make_run("c", [4.0, 3.0, 2.0, 1.0, None], settings | {"n_layer": 3}, seconds=0.25)),
        ]
    )
    assert common_grid(groups, "step").tolist() == [5, 10, 15, 20]
    assert common_grid(groups, "time_s").tolist() == [2.5, 5.0, 7.5, 10.0]
    rows = [line.split("  ") for line in table(groups).splitlines()]
    rows = [[cell.strip() for cell in row if cell] for row in rows]
    two, three = "n_layer=2 (2 runs)", "n_layer=3"
    assert rows == [
        ["validation loss at equal steps", "5", "10", "15", "20"],
        [two, "3.2500 ±0.2500", "2.5000 ±0.5000", "2.5000 ±0.0000", "2.5000 ±0.5000"],
        [three, "3.5000", "3.0000", "2.5000", "2.0000"],
        [],
        ["validation loss at equal tokens", "500", "1,000", "1,500", "2,000"],
        [two, "3.2500 ±0.2500", "2.5000 ±0.5000", "2.5000 ±0.0000", "2.5000 ±0.5000"],
        [three, "3.5000", "3.0000", "2.5000", "2.0000"],
        [],
        ["validation loss at equal seconds", "2.5", "5.0", "7.5", "10.0"],
        [two, "3.6250 ±0.1250", "3.2500 ±0.2500", "2.8750 ±0.3750", "2.5000 ±0.5000"],
        [three, "3.0000", "2.0000", "1.0000", "nan"],
        [],
        ["best validation loss", "loss", "at step"],
        [two, "2.0000 ±0.0000", "10 to 20"],
        [three, "1.0000", "30"],
    ]


def test_bits_per_byte_where_a_run_tells_them(make_run):
    line = '{"step": 9, "tokens": 9, "time_s": 9, "train_loss": 1, "val_loss": 0.5, "val_bpb": 0.25}\n'
    told, silent = read_run(make_run("a", [4.0], tail=line)), read_run(make_run("b", [3.0, 2.0]))
    rows = table(group_repeats([told, silent])).splitlines()[-3:]
    assert [row.split()[-1] for row in rows] == ["byte", "0.2500", "10"]


def test_a_cut_last_line_is_forgiven_a_damaged_one_before_it_is_not(make_run):
    assert read_run(make_run("a", [4.0, 3.0], tail='{"step": 20, "val_')).evals["val_loss"].tolist() == [4.0, 3.0]
    bad = make_run("b", [4.0], tail='{"step": 20, "val_\n{"step": 30}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: damaged line"):
        read_run(bad)
    incomplete = make_run("c", [4.0], tail='{"step": 20, "val_loss": 1.0}\n{"step": 30}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: damaged line"):
        read_run(incomplete)


def test_every_run_that_cannot_be_read_is_named(make_run, tmp_path):
    with pytest.raises(InputError) as caught:
        main([str(tmp_path / "nowhere"), str(make_run("a", [4.0])), str(make_run("empty", []))])
    missing, empty = str(caught.value).splitlines()
    assert "nowhere" in missing
    assert "out_dir" in missing
    assert "empty" in empty
    assert "no evaluation yet" in empty


def test_a_picture_is_drawn_even_of_one_evaluation_and_of_nan(make_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [str(make_run("a", [4.0])), str(make_run("b", [4.0, None, 3.0])), str(make_run("c", [None]))]
    main([*runs, f"--out={tmp_path / 'x.png'}"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"--out=.*\.png, \.svg or \.pdf"):
        main([*runs, f"--out={tmp_path / 'x.docx'}"])


def test_layers_are_read_and_drawn(make_run, tmp_path):
    pytest.importorskip("matplotlib")
    norms = {"clipped": 2} | {what: {"tokens": 0.5, "norm": None} for what in NORMS}
    tail = "".join(json.dumps({"step": step} | norms) + "\n" for step in (3, 6))
    path = make_run("a", [4.0, 3.0], tail=tail)
    run = read_run(path)
    assert [line["step"] for line in run.layered] == [3, 6]
    figure = pytest.importorskip("matplotlib.figure").Figure()
    draw_layers(run, figure)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["tokens"] == [[3, 0.5], [6, 0.5]]
    assert [x for x, _ in lines["clipped"]] == [3, 6]
    plain = str(make_run("b", [4.0]))
    main([str(path), plain, f"--out={tmp_path / 'x.png'}"])
    main([plain, f"--out={tmp_path / 'y.png'}"])
    taller, lower = (int.from_bytes((tmp_path / name).read_bytes()[20:24], "big") for name in ("x.png", "y.png"))
    assert taller > 1.5 * lower


def test_without_matplotlib_the_table_still_prints(make_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install -e \.\[plots\]"):
        main([str(make_run("a", [4.0, 3.0]))])
    assert "validation loss at equal steps" in capsys.readouterr().out
