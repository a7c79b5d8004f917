"""Runs, checkpoints and datasets of version 0.1 still work; tests/fixtures/v0_1/README.md has how they were made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TIMED_FIELDS, TINY, Run, call_main, metrics

import budget
import evaluate
import sample
from nanogpt.data.dataset import open_dataset

V0_1 = ROOT / "tests/fixtures/v0_1"
DATA = {"gpt2_adamw": "char", "modern_muon": "docs", "chat_masked": "chat", "minutes": "char"}
CPU = ("--device=cpu", "--dtype=float32")


def assert_close(ours: Any, theirs: Any) -> None:
    """Numbers differ by 1e-4 at most, as between kinds of CPUs; ours may have more names."""
    if isinstance(theirs, dict):
        for name in theirs:
            assert_close(ours[name], theirs[name])
    else:
        assert ours == (pytest.approx(theirs, rel=1e-4) if isinstance(theirs, float) else theirs)


def copy_run(name: str, folder: Path) -> dict[str, Any]:
    """Copy a run; return the keys that resume it."""
    out_dir = shutil.copytree(V0_1 / "runs" / name, folder / name)
    return {"out_dir": out_dir, "dataset": V0_1 / "data" / DATA[name], "resume": True, "verify_data": True}


@pytest.mark.parametrize("name", ["gpt2_adamw", "modern_muon", "chat_masked"])
def test_resumed_runs_reach_the_same_losses(name: str, run: Run, tmp_path: Path):
    assert run(**dict.fromkeys(TINY, ...) | copy_run(name, tmp_path)) == 0
    lines = metrics(tmp_path / name)
    expected = [json.loads(line) for line in (V0_1 / f"expected/{name}.metrics.jsonl").read_text().splitlines()]
    assert len(expected) == 23
    for ours, theirs in zip(lines, expected, strict=True):
        assert_close(ours, {field: value for field, value in theirs.items() if field not in TIMED_FIELDS})


def test_a_resumed_time_budget_decays_and_ends(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "process_age", lambda: 4.0)  # which leaves two seconds of the stored run's 24
    assert run(**dict.fromkeys(TINY, ...) | copy_run("minutes", tmp_path)) == 0
    newest = max((tmp_path / "minutes").glob("ckpt/step-*"))
    state = json.loads((newest / "state.json").read_text())
    assert state["config"]["schedule"] == "trapezoid"
    assert state["dial"]["spent_s"] > 0
    before = metrics(V0_1 / "runs/minutes")
    lines = metrics(tmp_path / "minutes")
    assert lines[: len(before)] == before
    rates = [line["lr"] for line in lines if "lr" in line]
    decay_iters = state["config"]["decay_iters"]
    assert rates[-decay_iters] == max(rates)
    assert decay_iters == 1 or rates[-1] < rates[-2]  # a busy machine may be left with a single step


@pytest.mark.parametrize(("sampling", "count", "temperature"), [("greedy", 1, 0), ("drawn", 2, 0.8)])
@pytest.mark.parametrize("name", DATA)
def test_samples_are_the_same(name: str, sampling: str, count: int, temperature: float, capsys: Any):
    prompt = ["--chat=True", "--start=Which bird?"] if name == "chat_masked" else ["--start=The cook"]
    prompt += ["--max_new_tokens=40", f"--num_samples={count}", f"--temperature={temperature}", "--seed=7"]
    call_main(sample.main, f"--out_dir={V0_1 / 'runs' / name}", *prompt, *CPU)
    assert capsys.readouterr().out == (V0_1 / f"expected/{name}.{sampling}.txt").read_bytes().decode()


@pytest.mark.parametrize("name", DATA)
def test_evaluations_are_the_same(name: str, tmp_path: Path):
    flags = (f"--out_dir={V0_1 / 'runs' / name}", f"--dataset={V0_1 / 'data' / DATA[name]}", "--split=val")
    call_main(evaluate.main, *flags, f"--json={tmp_path / 'loss.json'}", *CPU)
    ours = json.loads((tmp_path / "loss.json").read_text())
    theirs = json.loads((V0_1 / f"expected/{name}.eval.json").read_text())
    assert Path(ours.pop("model")).name == Path(theirs.pop("model")).name
    assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "files", "vocab_size"), [("char", 1, 36), ("docs", 4, 300), ("chat", 1, 300)])
def test_datasets_hold_their_texts(name: str, files: int, vocab_size: int):
    dataset = open_dataset(V0_1 / "data" / name, block_size=32, verify=True)
    assert (dataset.vocab_size, len(dataset.train.shards)) == (vocab_size, files)
    assert dataset.train.has_mask == (name == "chat")
    text = ""  # of the tokens that count in the loss
    for split in (dataset.train, dataset.val):
        text += dataset.tokenizer.decode(split[0 : len(split)][split.mask(0, len(split)) == 1].tolist())
    if name == "char":
        assert text == (V0_1 / "texts/char.txt").read_text(encoding="utf-8")
        return
    rows = [json.loads(line) for line in (V0_1 / f"texts/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    if name == "docs":
        assert {*text.split("<|endoftext|>")} == {"", *(row["text"] for row in rows)}
        return
    answers = [row["completion"] for row in rows if "completion" in row]
    for message in (message for row in rows for message in row.get("messages", [])):
        if message["role"] == "assistant":
            answers.append(message["content"])
    assert sorted(text.split("<|im_end|>")) == sorted(["", *answers])
