"""--tasks of evaluate.py: what lm-evaluation-harness reports is what our model gives, scored by hand."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main, environment
from random_models import MODERN, SMALL, generate_greedy, save_random_run

import evaluate
from model import GPT
from nanogpt.errors import InputError
from nanogpt.text.tokenizer import Tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval (the extra eval) is not installed")
pytest.importorskip("accelerate", reason="accelerate (the extra eval) is not installed")

TEXT = "".join(np.random.default_rng(0).choice([*"aaaeeeiioubdklmrstvéß—±(12.,", *(" " * 6), "\n  "], 8000))
LINES = [line.strip() for line in TEXT.splitlines() if len(line.strip()) > 20][:31]
BPE = Tokenizer.train_bpe([TEXT], 300)
SHAPES: dict[str, tuple[Tokenizer, dict[str, Any]]] = {
    "gpt2": (BPE, SMALL),
    "modern": (BPE, MODERN | {"tied": False, "n_kv_head": 2}),
    "characters": (Tokenizer.characters(TEXT), SMALL | {"block_size": 64}),
}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{line[:at]}}",  # nothing, a little, or more than the model's context; some end with spaces
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{line[:at + 1]}}",
        "doc_to_target": "{{line[at + 1:]}}",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": 9, "until": ["."]},
        "metric_list": [{"metric": "exact_match"}],
    },
}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """30 examples, and the folder `tasks` with three tasks on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # evaluate.py removes its folder
    rows = []
    for i, line in enumerate(LINES[:30]):
        cut = (0, 5, len(line) // 2, len(line) - 6)[i % 4]
        choices = [line[cut : cut + 20], LINES[(i + 1) % 30][:9], f" {LINES[(i + 2) % 30][:5]}", "ab"]
        rows.append({"line": line, "at": cut, "choices": choices, "text": "\n".join(LINES[i : i + i % 5 + 1])})
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in TASKS:
        write_task(name, name)
    return rows


def write_task(name: str, base: str, yaml: str = "", **changes: Any) -> None:
    folder = Path("tasks").resolve()
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    task |= {"fewshot_split": "test"} | TASKS[base] | changes
    (folder / f"{name}.yaml").write_text(f"{json.dumps(task)[:-1]}{yaml}}}")  # JSON is YAML


@pytest.fixture
def run_tasks(examples: Any) -> Evaluate:
    """`run_tasks("name,name", "--flag" …)`: the results that evaluate.py writes for the run in `out`."""

    def call(tasks: str, *flags: str) -> dict[str, Any]:
        fixed = ["--device=cpu", "--dtype=float32", "--json=results.json", "--include_path=tasks", f"--tasks={tasks}"]
        call_main(evaluate.main, *fixed, *flags)
        return json.loads(Path("results.json").read_text())

    return call


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the harness returned, with its samples and the options of the call."""
    reports, run = [], lm_eval.simple_evaluate

    def simple_evaluate(model: Any, **options: Any) -> Any:
        results = run(model, **options) | {"groups": {"all": {"alias": "all", "acc,none": 0.25}}}
        reports.append(results | {"options": options})
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    return reports


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The harness's rule: spaces at the end of a context belong to the continuation."""
    stripped = context.rstrip()
    ids = tokenizer.encode(context + continuation)
    first = len(tokenizer.encode(stripped))
    return ids[:first] or [tokenizer.end_of_text or 0], ids[first:]


@torch.no_grad()
def logprob(model: GPT, ids: list[int], count: int) -> float:
    """The log-probability of the last `count` ids in nats, of at most a context and one id."""
    row = torch.tensor([ids[-model.config.block_size - 1 :]])
    logits = model(row[:, :-1], row[:, 1:])[0]
    logprobs = logits.log_softmax(-1).gather(-1, row[:, 1:, None])[0, :, 0]
    return float(logprobs[len(logprobs) - count :].sum())


def rolling_logprob(model: GPT, tokenizer: Tokenizer, text: str) -> float:
    """The log-probability of a text in nats. Its last window is filled up with the ids before it."""
    T = model.config.block_size
    ids = [tokenizer.end_of_text or 0, *tokenizer.encode(text)]
    ends = [*range(T + 1, len(ids), T), len(ids)]
    return sum(logprob(model, ids[:end], (end - 2) % T + 1) for end in ends)


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "sizes"), SHAPES.values(), ids=SHAPES)
def test_tasks_give_the_scores_of_the_model(
    run_tasks: Evaluate, reports: list[Any], examples: list[dict[str, Any]], tokenizer: Tokenizer, sizes: dict[str, Any]
):
    model = save_random_run("out", tokenizer, **sizes)
    T = model.config.block_size
    results = run_tasks("choice,rolling,writing")["results"]
    samples = {name: sorted(reports[0]["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    nats, texts = 0.0, set()
    for i, row in enumerate(examples):
        sample = samples["choice"][i]
        for (context, continuation), (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
            assert context == row["line"][: row["at"]]
            ids, targets = split_pair(tokenizer, context, continuation)
            expected = logprob(model, ids + targets, len(targets))
            assert answer[0] == pytest.approx(expected, abs=1e-4)
        nats -= rolling_logprob(model, tokenizer, row["text"])

        prompt = tokenizer.encode(row["line"][: row["at"] + 1])[-(T - 9) :]
        new = generate_greedy(model, prompt, 9)[len(prompt) :]
        if tokenizer.end_of_text in new:
            new = new[: new.index(tokenizer.end_of_text)]
        text = tokenizer.decode([token for token in new if token not in tokenizer.special_tokens.values()])
        text = text.split(".")[0]
        assert samples["writing"][i]["resps"] == [[text]]
        texts.add(text)
    assert len(texts) > 5
    num_bytes = sum(len(row["text"].encode()) for row in examples)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)


@pytest.mark.slow
def test_tasks_as_a_user_runs_them(run_tasks: Evaluate):
    """In a process: a task that imports Hugging Face's `evaluate`, few-shot examples, and data that is out of reach."""
    save_random_run("out", BPE, block_size=64)
    code = "def same(doc, results):\n    import evaluate\n\n    return {'exact_match': hasattr(evaluate, 'combine')}\n"
    Path("tasks/own.py").write_text(code)
    write_task("own", "writing", ", process_results: !function own.same", num_fewshot=1)

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "evaluate.py"), "--out_dir=out", "--device=cpu", "--dtype=float32"]
        return subprocess.run([*command, *flags], capture_output=True, text=True, env=environment(), timeout=300)

    done = call("--tasks=own,rolling", "--include_path=tasks", "--limit=3", "--json=results.json")
    assert done.returncode == 0, done.stderr
    assert "|rolling|" in done.stdout
    results = json.loads(Path("results.json").read_text())
    assert results["model"] == "out/ckpt/step-001234"
    assert results["results"]["own"]["exact_match,none"] == 1
    assert results["n-samples"]["own"]["effective"] == 3
    assert results["n-shot"]["own"] == 1

    offline = call("--tasks=lambada_openai")
    assert offline.returncode == 2
    assert offline.stderr.splitlines()[-1].startswith("error: --tasks=lambada_openai: a task failed")
    assert "Traceback" not in offline.stderr


@pytest.mark.slow
def test_tasks_that_fail_are_one_line(run_tasks: Evaluate, monkeypatch: pytest.MonkeyPatch):
    from lm_eval import tasks
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    own = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: own(None, include_path, False))
    Path("tasks/own.py").write_text("def broken(doc, results):\n    return {'acc': doc['no such']}\n")
    model = save_random_run("out", BPE)

    def error(name: str, *flags: str) -> str:
        with pytest.raises(InputError) as caught:
            run_tasks(name, "--limit=2", *flags)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert error("choise,what") == "--tasks=choise,what: unknown; did you mean choice?"
    write_task("own", "choice", ", unsafe_code: true, process_results: !function own.broken")
    assert "--unsafe_code=True" in error("own")
    assert "(KeyError: 'no such', own.py:2)" in error("own", "--unsafe_code=True")
    assert "a task failed (" in error("choice", "--num_fewshot=50")
    write_task("own", "choice", dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    assert "nowhere.jsonl" in error("own")
    assert "chat_template" in error("choice", "--chat=True")

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr(HFLM, "_model_call", no_memory)
        assert "too little memory" in error("choice")
    with torch.no_grad():
        model.norm.weight.fill_(3e38)  # finite, as a model that is loaded must be, but its logits are not
    monkeypatch.setattr(GPT, "from_checkpoint", lambda _: copy.deepcopy(model))
    for task in ("choice", "writing"):
        assert "NaN or inf logits" in error(task)


def test_tasks_pass_the_chat_template_and_flags_on(
    run_tasks: Evaluate, reports: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    chat = Tokenizer.train_bpe([TEXT], 300)
    chat.template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    save_random_run("out", chat, block_size=64)
    run_tasks("choice", "--chat=True", "--limit=1", "--num_fewshot=0", "--unsafe_code=True")
    (report,) = reports
    (sample,) = report["samples"]["choice"]
    assert sample["arguments"][0][0].startswith("<|im_start|>")
    options = report["options"]
    assert (options["limit"], options["num_fewshot"], options["confirm_run_unsafe_code"]) == (1, 0, True)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    printed = capsys.readouterr().out
    assert "|choice|" in printed
    assert "|all" in printed
