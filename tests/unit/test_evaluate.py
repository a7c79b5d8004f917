"""evaluate.py against transformers, arithmetic by hand, chance itself, and lm-evaluation-harness's own backend."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, Run, Source, environment, save_as_nanogpt
from test_export import MODERN, SMALL, greedy, train_nothing

import evaluate
import export
from model import GPT, GPTConfig
from nanogpt import harness
from nanogpt.data.dataset import Shard, Tokens
from nanogpt.data.rows import EvalWindows
from nanogpt.data.write import write_dataset
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.evaluation import evaluate, logprobs
from nanogpt.generate.sampling import Sampling, Token
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

CPU = World(0, 1, torch.device("cpu"), torch.float32)
TEXT = "".join(np.random.default_rng(0).choice([*"aaaeeeiioubdklmrstvéß—±(12.,", *(" " * 6), "\n  "], 8000))
WORDS = Tokenizer.train_bpe([TEXT], 300)
SHAPES = {"gpt2": SMALL, "modern": MODERN | {"tied": False, "n_kv_head": 2}}
Tell = Callable[..., dict[str, Any]]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """`tell("--flag" …)`: the results that evaluate.py writes."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> dict[str, Any]:
        fixed = ["--device=cpu", "--dtype=float32", "--json=told.json"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *fixed, *flags])
        evaluate.main()
        return json.loads(Path("told.json").read_text())

    return call


def exported(monkeypatch: pytest.MonkeyPatch, **shape: Any) -> tuple[GPT, str]:
    """A model with WORDS of no training, and the name of the folder that export.py has made of it."""
    model = train_nothing(Path("out"), WORDS, **shape)
    monkeypatch.setattr(sys, "argv", ["export.py", "--to=theirs"])
    export.main()
    return model, "theirs"


def tiny(T: int = 16, **shape: Any) -> GPT:
    """A model of four letters that says other things than chance would."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 4, "block_size": T, "dropout": 0.5}
    model = GPT(GPTConfig(**sizes | shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def split(ids: np.ndarray, mask: np.ndarray | None = None) -> Tokens:
    return Tokens([Shard("it", len(ids), lambda: ids.astype(np.uint16), None if mask is None else lambda: mask)])


# ---- loss


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_loss_and_bits_per_byte_are_those_of_transformers(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
):
    (_, folder), text = exported(monkeypatch, **shape), TEXT[:3000] + f"¿{END_OF_TEXT}?\r\n"
    Path("it.txt").write_bytes(text.encode())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [words.eos_token_id, *words(text, split_special_tokens=True, verbose=False)["input_ids"]]
    nats = 0.0
    for start in range(0, len(ids) - 1, 24):
        row = torch.tensor([ids[start : start + 25]])
        logprobs = theirs(row[:, :-1]).logits.double().log_softmax(-1)
        nats -= float(logprobs.gather(-1, row[:, 1:, None]).sum())
    for source in ("--init_from=theirs", "--out_dir=out"):
        told = tell(source, "--text=it.txt")
        assert told["tokens"] == len(ids) - 1
        assert abs(told["loss"] - nats / (len(ids) - 1)) <= 1e-5
        assert abs(told["bits_per_byte"] - nats / math.log(2) / len(text.encode())) <= 1e-5
        assert told["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)


@torch.no_grad()
def one_by_one(model: GPT, ids: np.ndarray, stride: int) -> np.ndarray:
    """−log P of each id after the first, each asked for alone: in the first window that reaches it."""
    T, found = model.config.block_size, []
    for at in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if at <= start + T)
        row = torch.tensor(ids[start:at].astype(np.int64))[None]
        logits = model(row)[0]
        assert logits is not None
        found.append(-float(logits[0, -1].double().log_softmax(-1)[int(ids[at])]))
    return np.array(found)


@pytest.mark.parametrize("tokens", [2, 12, 17, 18, 65, 70])
def test_every_token_counts_once_in_its_window(source: Source, monkeypatch: pytest.MonkeyPatch, tokens: int):
    monkeypatch.setattr(evaluate, "rows_to_score", lambda *_: 3)
    model, ids = tiny(), source.draw(tokens)
    mask = np.arange(tokens) % 3 > 0
    for stride in (1, 5, 15, 16, 0):
        each = one_by_one(model, ids, stride or 16)
        loss, _, counted = evaluate.split_loss(model, split(ids), stride, CPU)
        assert (counted, loss) == (tokens - 1, pytest.approx(each.mean(), abs=1e-6))
        loss, _, counted = evaluate.split_loss(model, split(ids, mask.astype(np.uint8)), stride, CPU)
        assert (counted, loss) == (mask[1:].sum(), pytest.approx(each[mask[1:]].mean(), abs=1e-6))


def test_full_windows_side_by_side_are_trains_evaluation(source: Source):
    model, ids = tiny(), source.draw(16 * 50 + 1)
    model.end_of_text = 3  # documents
    tokens = split(ids, np.random.default_rng(0).random(len(ids)) < np.resize([0.9, 0.1, 0, 0], len(ids)))
    expected = evaluate(model, EvalWindows(tokens, 16, 0, 7, 4), 7, CPU)
    assert evaluate.split_loss(model, tokens, 0, CPU)[0] == pytest.approx(expected, abs=1e-6)


def test_error_and_mixture_by_hand(source: Source):
    model, one, two = tiny(), source.draw(16 * 30 + 1), source.draw(16 * 5 + 1) // 2
    each = one_by_one(model, one, 16)
    means = each.reshape(-1, 16).mean(1)
    loss, error, _ = evaluate.split_loss(model, split(one), 0, CPU)
    assert (loss, error) == (pytest.approx(means.mean()), pytest.approx(means.std(ddof=1) / math.sqrt(30)))
    other, its_error, _ = evaluate.split_loss(model, split(two), 0, CPU)
    loss, mixed, counted = evaluate.split_loss(model, Tokens.mixed([split(one), split(two)], [3, 1]), 0, CPU)
    assert (counted, loss) == (35 * 16, pytest.approx((3 * means.mean() + other) / 4))
    # Between the sources the stretches differ for certain, not by chance.
    assert mixed == pytest.approx(math.hypot(3 * error, its_error) / 4, rel=1e-6)
    assert math.isnan(evaluate.split_loss(model, split(one[:17]), 0, CPU)[1])


@pytest.mark.parametrize(("kind", "stride"), [("plain", 0), ("plain", 4), ("masked", 0), ("mixed", 0), ("moody", 0)])
def test_error_is_how_far_other_splits_are(source: Source, kind: str, stride: int):
    """Splits drawn anew: their losses spread as their errors say."""
    model, random = tiny(), np.random.default_rng(7)
    draws = Source(seed=11)

    def draw(size: int) -> Tokens:
        if kind == "moody":  # for some windows on end there is but one letter, an easy one
            moods = np.repeat(random.random(size // 50 + 1) < 0.5, 50)[:size]
            ids = np.where(moods, 2, random.integers(4, size=size))
        else:
            ids = draws.draw(size)
        # Whole stretches count much, others little: a mean of the stretches' means would weigh them alike.
        masked = random.random(size) < np.repeat(random.choice([0.05, 0.9], -(-size // 16)), 16)[:size]
        return split(ids, masked.astype(np.uint8) if kind == "masked" else None)

    found = []
    for _ in range(150):
        size = 16 * 64 * 8 if kind == "moody" else 500
        tokens = Tokens.mixed([draw(500), draw(200)], [1, 4]) if kind == "mixed" else draw(size)
        found.append(evaluate.split_loss(model, tokens, stride, CPU)[:2])
    losses, errors = np.array(found).T
    # The deviation of 150 draws is known to 6%.
    assert 0.82 < np.sqrt((errors**2).mean()) / losses.std(ddof=1) < 1.2


def test_of_a_run(run: Run, tell: Tell, letters: Path, one_and_two: Path, capsys: pytest.CaptureFixture[str]):
    run(out_dir="out", max_iters=10)
    capsys.readouterr()
    val, train = tell("--out_dir=out"), tell("--out_dir=out", "--split=train", "--checkpoint=step-000008")
    said = capsys.readouterr()
    assert said.err.splitlines() == ["evaluating out/ckpt/step-000010", "evaluating out/ckpt/step-000008"]
    first, second, third = said.out.splitlines()[:3]
    assert first == "val of letters: 1,999 tokens"
    assert second == f"loss           {val['loss']:.4f} ± {val['loss_stderr']:.4f} nats per token"
    assert third == f"perplexity     {val['perplexity']:.4f} ± {val['perplexity_stderr']:.4f}"
    assert (train["tokens"], val["bits_per_byte"]) == (19_999, None)  # the bytes are not known
    each = one_by_one(GPT.from_checkpoint("out").eval(), np.fromfile(letters / "val.bin", np.uint16), 16)
    assert val["loss"] == pytest.approx(each.mean(), abs=1e-5)
    mixture = f"{one_and_two / 'one'}:0.7,{one_and_two / 'two'}:0.3"
    assert tell("--out_dir=out", f"--dataset={mixture}", "--stride=4")["tokens"] < 2 * 1999
    run(out_dir="out-documents", max_iters=10, dataset=mixture, mask_documents=True)
    found = tell("--out_dir=out-documents")
    model = GPT.from_checkpoint("out-documents").eval()
    assert found["loss"] != pytest.approx(tell("--out_dir=out", f"--dataset={mixture}")["loss"], abs=1e-3)
    model.end_of_text = 3
    tokens = evaluate.data.open_dataset(mixture, block_size=16).val
    assert found["loss"] == pytest.approx(evaluate.split_loss(model, tokens, 0, CPU)[0], abs=1e-9)


def test_bad_input(run: Run, tell: Tell, letters: Path, monkeypatch: pytest.MonkeyPatch):
    def fault(*flags: str) -> str:
        with pytest.raises(InputError) as error:
            tell(*flags)
        return str(error.value)

    assert "nowhere holds no checkpoint" in fault("--out_dir=nowhere")
    assert "limit=0: must be at least 1" in fault("--tasks=hellaswag", "--limit=0")
    told = fault("--tasks=hellaswag", "--stride=4", "--text=it.txt", "--include_path=no").splitlines()
    assert told[:2] == [f"{name}: tasks bring their own texts; leave it out" for name in ("text", "stride")]
    assert told[2] == "include_path=no: is no folder; give one that holds tasks as YAML files"
    assert (
        fault("--json=nowhere/it.json")
        == "json=nowhere/it.json: its folder is not there; make it, or give another file"
    )
    assert fault("--json=.") == "json=.: is a folder; give a file"
    assert fault("--limit=3") == "limit: is for --tasks alone; leave it out"
    assert fault("--tasks= ,") == "tasks: names none; give --tasks=hellaswag, or leave it out"
    assert fault("--text=") == "text: names no file; give --text=FILE, or leave it out"
    assert fault("--init_from=gpt2", "--checkpoint=latest", "--out_dir=out").splitlines() == [
        f"{name}: init_from=gpt2 takes its place; leave it out" for name in ("out_dir", "checkpoint")
    ]
    with monkeypatch.context() as torchrun:
        torchrun.setenv("WORLD_SIZE", "2")
        assert fault("--out_dir=nowhere").startswith("evaluation runs in one process")
    assert fault("--text=it.txt", "--split=val") == "split: text=it.txt takes its place; leave it out"

    run(out_dir="out", max_iters=0)
    assert fault("--out_dir=out", "--stride=17") == (
        "stride=17: tokens between windows would not count; give --stride=16 or less"
    )
    other = Path("other")
    write_dataset(other, {"train": [np.arange(4)], "val": [np.arange(4)]}, Tokenizer.characters("abce"))
    assert "dataset=other: its ids are not those of the model's tokenizer" in fault("--out_dir=out", "--dataset=other")
    write_dataset(other, {"train": [np.arange(5)], "val": [np.arange(5)]}, Tokenizer.characters("abcde"))
    assert "holds id 4, but the model's vocab_size is 4" in fault("--out_dir=out", "--dataset=other")
    assert "there is no dataset 'letter'" in fault("--out_dir=out", "--dataset=letter")
    (other / "val.bin").unlink()
    assert "other/val.bin is missing" in fault("--out_dir=out", "--dataset=other")
    Path("it.txt").write_bytes(b"abc\xff")
    assert "text=it.txt: cannot be read as UTF-8 text" in fault("--out_dir=out", "--text=it.txt")
    Path("it.txt").write_bytes(b"a")
    assert "text=it.txt: has no token to predict" in fault("--out_dir=out", "--text=it.txt")
    assert "text=no.txt: cannot be read" in fault("--out_dir=out", "--text=no.txt")
    Path("it.txt").write_bytes(b"abcx")
    assert "has no id for 'x'" in fault("--out_dir=out", "--text=it.txt")
    Path("it.txt").write_bytes(b"abcd")
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    assert fault("--tasks=hellaswag") == "tasks=hellaswag: lm_eval is not installed; run `pip install -e .[eval]`"
    told = tell("--init_from=out", "--checkpoint=step-000000", "--text=it.txt")  # a text of fewer bytes than a window
    assert told["model"] == "out/ckpt/step-000000"
    Path("out/ckpt/step-000000/state.json").write_text("{")
    assert "the SHA-256 of state.json is not the manifest's" in fault("--out_dir=out")
    Path("out/ckpt/step-000000/state.json").unlink()
    assert "is damaged" in fault("--out_dir=out")


def test_of_what_others_trained(
    tell: Tell, letters: Path, foreign: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """nanoGPT's ckpt.pt names its dataset; of an exported folder it is told where it lies, and no more."""
    save_as_nanogpt(foreign, Path("ckpt.pt"), config={"dataset": str(letters)})
    told = tell("--init_from=ckpt.pt")
    assert (told["on"], told["tokens"], told["model"]) == ("val of letters", 1_999, "ckpt.pt")
    exported(monkeypatch, **SMALL)
    Path("it.txt").write_text(TEXT[:200])
    capsys.readouterr()
    assert tell("--init_from=theirs", "--text=it.txt")["model"] == "theirs"
    assert capsys.readouterr().err.splitlines() == ["evaluating theirs"]


def test_number_formats(source: Source):
    """bfloat16 is autocast's, and what is no number is no result."""
    model, ids = tiny(), source.draw(16 * 4 + 1)
    rows = torch.tensor(ids.astype(np.int64))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(rows[:-1].view(4, 16), rows[1:].view(4, 16))[0]
    assert logits is not None
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[1:]).item()
    half = World(0, 1, torch.device("cpu"), torch.bfloat16)
    assert evaluate.split_loss(model, split(ids), 0, half)[0] == pytest.approx(expected, abs=1e-6)
    assert evaluate.split_loss(model, split(ids), 0, CPU)[0] != pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    with pytest.raises(InputError, match="what the model gives is no number: its weights are broken"):
        evaluate.split_loss(model, split(ids), 0, CPU)


# ---- tasks

LINES = [line.strip() for line in TEXT.splitlines() if len(line.strip()) > 20]
TASKS: dict[str, dict[str, Any]] = {
    "mini_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{line[:at]}}",  # none of it, a little, or more than the context; some end with spaces
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "mini_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "mini_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{line[:at + 1]}}",
        "doc_to_target": "{{line[at + 1:]}}",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(stops: list[str]) -> dict[str, Any]:
    """A folder `tasks` with the three of them and 30 examples; returns their settings."""
    folder = Path("tasks")
    folder.mkdir()
    with (folder / "it.jsonl").open("w") as file:
        for i, line in enumerate(LINES[:30]):
            cut = (0, 5, len(line) // 2, len(line) - 6)[i % 4]
            choices = [line[cut : cut + 20], LINES[i + 1][:9], f" {LINES[i + 2][:5]}", "ab"]
            row = {"line": line, "at": cut, "choices": choices, "text": "\n".join(LINES[i : i + i % 5 + 1])}
            file.write(json.dumps(row) + "\n")
    files = {"data_files": {"test": str(folder.resolve() / "it.jsonl")}, "cache_dir": str(folder.resolve() / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "fewshot_split": "test"}
    settings = {name: {"task": name} | common | own for name, own in TASKS.items()}
    settings["mini_writing"]["generation_kwargs"] = TASKS["mini_writing"]["generation_kwargs"] | {"until": stops}
    for name, own in settings.items():
        (folder / f"{name}.yaml").write_text(json.dumps(own))  # which is YAML, too
    return settings


def asking(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """Requests as the harness makes them."""
    instance = pytest.importorskip("lm_eval.api.instance", reason="lm_eval (the extra eval) is not installed")
    return [instance.Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_scores_by_hand():
    """Of contexts that are nothing, or white space alone; of a continuation that takes two windows."""
    requests = asking("loglikelihood", ("", "\na"), (" ", "a"), ("a", "\n"))

    model, letters = tiny(T=4), Tokenizer.characters("\n ab")  # which have no end of text: ids from 0 on, in order
    asked = harness.NanoGPTLM(model, letters, CPU)
    expected = [logprobs(model, ids).sum().item() for ids in ([0, 0, 2], [0, 1, 2], [2, 0])]
    assert [total for total, _ in asked.loglikelihood(requests, True)] == pytest.approx(expected, abs=1e-6)
    assert asked.loglikelihood_rolling(asking("loglikelihood_rolling", ("\na",)), True) == pytest.approx(expected[:1])
    assert harness.NanoGPTLM(model, WORDS, CPU).tok_encode(f"a{END_OF_TEXT}")[1:] == [WORDS.end_of_text]

    for wrong in (None, 2, 7):  # the place of the one id that is not the likeliest
        ids = [1]
        for at in range(8):
            best = greedy(model, ids[4 * (at // 4) :], 1)[-1]
            ids.append((best + 1) % 4 if at == wrong else best)
        ((_, is_greedy),) = asked._loglikelihood_tokens([(("", ""), ids[:1], ids[1:])], True)
        assert is_greedy is (wrong is None)
    with torch.no_grad():
        model.norm.weight[0] = math.nan  # of which the likeliest id would be the first
    with pytest.raises(InputError, match="what the model gives is no number"):
        asked.loglikelihood(requests, True)


def test_texts_by_a_script(monkeypatch: pytest.MonkeyPatch):
    """What becomes of the ids that a decoder gives, and how it is asked for them."""
    plain, drawn = {"until": ["zz"], "max_gen_toks": 9}, {"do_sample": True, "max_gen_toks": 9}
    ended = {"until": ["<|im_end|>"], "max_gen_toks": 9}
    narrow = drawn | {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1}
    wide = drawn | {"temperature": 0.5, "top_k": -1, "top_p": None}
    kinds = [plain, narrow, ended, plain, wide, drawn, ended]
    requests = asking("generate_until", *((f"{i}", settings) for i, settings in enumerate(kinds)))

    calls = []

    class Script:
        def __init__(self, *_: Any):
            pass

        def generate(self, texts: Any, most: int, how: Any, samples: list[int]) -> Any:
            calls.append(([WORDS.decode(text) for text in texts], samples, how))
            for text in ("a", "<|im_start|>", "b", "<|im_end|>", "c", END_OF_TEXT, "d"):
                yield [Token(WORDS.encode(f"{i}" if text == "a" else text)[0]) for i in samples]

    monkeypatch.setattr(harness, "Decoder", Script)
    texts = harness.NanoGPTLM(tiny(), WORDS, CPU).generate_until(requests, True)
    assert texts == ["0bc", "1bc", "2b", "3bc", "4bc", "5bc", "6b"]
    how = Sampling(0.5, vocab_size=300)
    likeliest = replace(how, temperature=0.0)
    assert [*zip(*calls, strict=True)] == [
        (["0", "3"], ["1"], ["2", "6"], ["4"], ["5"]),
        ([0, 3], [1], [2, 6], [4], [5]),
        (likeliest, replace(how, top_k=7, top_p=0.9, min_p=0.1), likeliest, how, replace(how, temperature=1.0)),
    ]


def test_flags_and_tables_of_tasks(tell: Tell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What evaluate.py asks the harness for, and that it prints groups, too."""
    pytest.importorskip("lm_eval", reason="lm_eval (the extra eval) is not installed")

    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    train_nothing(Path("out"), WORDS)
    told: dict[str, Any] = {name: {"one": {"alias": name, "acc,none": 0.25}} for name in ("results", "groups")}
    told |= {"versions": {"one": 1}, "n-shot": {"one": 2}, "higher_is_better": {"one": {"acc": True}}}
    calls = []
    monkeypatch.setattr(harness, "run_tasks", lambda *args, **options: calls.append((args[1:], options)) or told)
    result = tell("--tasks=one, two,", "--num_fewshot=2", "--limit=3", "--unsafe_code=True", "--include_path=.")
    options = {"num_fewshot": 2, "limit": 3, "confirm_run_unsafe_code": True}
    assert calls == [((["one", "two"], "."), options)]
    assert result["results"] == told["results"]
    assert result["model"] == "out/ckpt/step-001234"
    printed = capsys.readouterr().out
    assert "|results|" in printed
    assert "|groups|" in printed


def test_tasks_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever a task raises is one line; what the model lacks is told as elsewhere."""
    pytest.importorskip("lm_eval", reason="lm_eval (the extra eval) is not installed")

    monkeypatch.chdir(tmp_path)
    settings = write_tasks(stops=[])["mini_choice"]
    Path("tasks/own.py").write_text("def broken(doc, results):\n    return {'acc': doc['no such']}\n")
    asked = harness.NanoGPTLM(tiny(vocab_size=300), WORDS, CPU)

    def fault(added: str, kind: type[Exception] = InputError, **options: Any) -> str:
        Path("tasks/mini_own.yaml").write_text(json.dumps(settings | {"task": "mini_own"})[:-1] + f"{added}}}")
        with pytest.raises(kind) as error:
            harness.run_tasks(asked, ["mini_own"], "tasks", **{"num_fewshot": 0, "limit": 2} | options)
        assert "\n" not in str(error.value)
        return str(error.value)

    start = "tasks=mini_own: "
    assert fault(", unsafe_code: true") == (
        f"{start}runs the code that the model writes: allow it by --unsafe_code=True, or leave it out"
    )
    broken = ", unsafe_code: true, process_results: !function own.broken"
    assert fault(broken, confirm_run_unsafe_code=True) == (
        f"{start}cannot be evaluated (KeyError: 'no such', own.py:2): mend the task, ask it with other flags, or leave "
        "it out"
    )
    assert fault("", num_fewshot=50).startswith(f"{start}cannot be evaluated (")
    missing = ", dataset_kwargs: {data_files: {test: nowhere.jsonl}}"
    assert fault(missing).startswith(f"{start}a file is missing (FileNotFoundError: ")

    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr(harness, "score", no_memory)
        assert fault("", MemoryError) == ""
    with torch.no_grad():
        asked.model.norm.weight[0] = math.nan
    assert fault("").startswith("what the model gives is no number")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tasks_as_the_harness_scores_the_exported_folder(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
):
    """Example by example, contexts that are empty, that end with spaces and that are too long included."""
    pytest.importorskip("lm_eval", reason="lm_eval (the extra eval) is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which lm_eval's own backend wants, is not installed")
    from lm_eval.models.huggingface import HFLM

    model, folder = exported(monkeypatch, **shape)
    said = WORDS.decode(greedy(model, WORDS.encode(LINES[1][:6]), 9)[-9:])  # in the second example
    stop = next(said[at : at + 2] for at in range(3, len(said)) if said[at : at + 2].isascii())
    write_tasks(stops=[stop, "|"])
    # With its cache of logits the backend (0.4.13) was found wrong by 0.8 nats where four texts went together: of two
    # windows that read the same and ask for unlike many tokens of it, one gets the other's.
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4, logits_cache=False)
    ours = harness.NanoGPTLM(model, WORDS, CPU)
    found = []
    for asked in (theirs, ours):
        results = harness.run_tasks(asked, [*TASKS], "tasks", num_fewshot=0)
        found.append({name: sorted(results["samples"][name], key=lambda x: x["doc_id"]) for name in TASKS})
        assert results["configs"].keys() == TASKS.keys()
        found[-1]["results"] = results["results"]
    for name in ("mini_choice", "mini_rolling"):
        for expected, got in zip(found[0][name], found[1][name], strict=True):
            assert got["arguments"] == expected["arguments"]
            for one, other in zip(expected["resps"], got["resps"], strict=True):
                (one,), (other,) = one, other
                one, other = (np.atleast_1d(np.array(x, dtype=float)) for x in (one, other))
                assert other == pytest.approx(one, abs=1e-4, rel=1e-6)  # log-probabilities of up to 60 tokens; greedy
    texts = [[x["resps"] for x in each["mini_writing"]] for each in found]
    assert texts[0] == texts[1]
    assert len({str(text) for text in texts[0]}) > 10
    assert texts[0][1] == [[said[: said.index(stop)]]]
    for name in TASKS:
        one, other = (
            {k: v for k, v in each["results"][name].items() if isinstance(v, float) and "stderr" not in k}
            for each in found
        )
        assert other == pytest.approx(one, rel=1e-5)
        assert len(one) > 0


@pytest.mark.slow
def test_tasks_as_a_user_asks_for_them(tell: Tell, monkeypatch: pytest.MonkeyPatch):
    """A long continuation, more to write than the context holds, and a task that wants Hugging Face's `evaluate`."""
    pytest.importorskip("lm_eval", reason="lm_eval (the extra eval) is not installed")

    model, _ = exported(monkeypatch, **SMALL)
    settings = write_tasks(stops=[])["mini_writing"]
    code = "def same(doc, results):\n    import evaluate\n\n    return {'exact_match': hasattr(evaluate, 'combine')}\n"
    Path("tasks/own.py").write_text(code)
    lengthy = {"task": "mini_own", "num_fewshot": 1, "generation_kwargs": {"until": [], "max_gen_toks": 40}}
    own_text = json.dumps(settings | lengthy)[:-1] + ", process_results: !function own.same}"
    Path("tasks/mini_own.yaml").write_text(own_text)

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(ROOT / "evaluate.py"),
            "--out_dir=out",
            "--device=cpu",
            "--dtype=float32",
            *flags,
        ]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)

    done = call("--tasks=mini_own,mini_rolling", "--include_path=tasks", "--limit=3", "--json=told.json")
    assert done.returncode == 0, done.stderr
    assert "|mini_rolling|" in done.stdout
    told = json.loads(Path("told.json").read_text())
    assert told["results"]["mini_own"]["exact_match,none"] == 1
    assert told["n-samples"]["mini_own"]["effective"] == 3
    assert told["n-shot"]["mini_own"] == 1

    offline = call("--tasks=lambada_openai")
    assert offline.returncode == 2
    assert "error: tasks=lambada_openai: their data cannot be had" in offline.stderr.splitlines()[-1]
    assert "Traceback" not in offline.stderr

    own = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: own(None, include_path, False))
    with pytest.raises(InputError, match=r"tasks=mini_choise: there is no such task; did you mean mini_choice\?"):
        tell("--tasks=mini_own,mini_choise", "--include_path=tasks")
    Path("tasks/mini_own.yaml").write_text(own_text.replace("same", "other"))
    with pytest.raises(InputError, match=r"tasks=mini_own: cannot be evaluated \(AttributeError.*\): mend the task"):
        tell("--tasks=mini_own", "--include_path=tasks")

    asked, ids = harness.NanoGPTLM(model, WORDS, CPU), WORDS.encode(TEXT)[:80]
    for context in ([5], [5, 6, 7]):
        ((total, _),) = asked._loglikelihood_tokens([(("", ""), context, ids)])
        before = [context[-1], *ids]
        whole = sum(float(logprobs(model, before[at : at + 25]).sum()) for at in (0, 24, 48))
        rest = float(logprobs(model, ids[-25:])[-8:].sum())  # 80 = 3 · 24 + 8
        assert total == pytest.approx(whole + rest, rel=1e-6)
    assert asked._loglikelihood_tokens([(("", ""), [5], [])]) == [(0.0, True)]
