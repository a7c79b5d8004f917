"""Evaluate a model: python evaluate.py --out_dir=out-shakespeare-char --split=val

Prints the loss, perplexity and bits per byte of a split or, with --text=FILE, of a text, for a run of train.py or, with
--init_from, for GPT-2, a Hugging Face folder or nanoGPT's ckpt.pt. Every token is a target once, except the first where
nothing precedes it. Windows of block_size tokens follow each other; with --stride=N they overlap, advancing by N
tokens, and only the last N of each are targets, so that each token beyond the first window sees at least
block_size - N before it.

Standard errors come from blocks: a split is cut into at most 64 blocks of whole windows, taken as independent (single
windows are not: on tiny Shakespeare they would halve the standard error). The loss is a ratio of sums over the blocks;
its error and the perplexity's are to first order, that of bits per byte is scaled. A mixture's parts count by weight.

--tasks=hellaswag,lambada_openai runs tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024) instead, by its own
Hugging Face backend on a temporary export of the model (pip install -e ".[eval]").
"""

import nanogpt.import_torch  # noqa: F401  # faster than `import torch`

# isort: split

import math
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import ExplicitKeys, key, parse
from load import LoadedModel, ModelKeys, find_two_sources, load_model
from model import GPT
from nanogpt import distributed
from nanogpt.cpu_kernels import use_cpu_kernels
from nanogpt.data.dataset import MixturePart, Tokens, open_dataset
from nanogpt.data.rows import SlidingWindows
from nanogpt.data.token_shards import TokenDtype
from nanogpt.distributed import World
from nanogpt.errors import InputError, raise_problems, run_script
from nanogpt.files import check_report, write_report
from nanogpt.generate.sampling import check_finite
from nanogpt.memory import MAX_TOKENS_PER_PASS, rows_to_score
from nanogpt.rendezvous import explain_errors, world_size
from nanogpt.text.streams import read_text
from nanogpt.text.tokenizer import Tokenizer
from nanogpt.trials import describe_dtype, try_dtypes

LOSS_KEYS = ("dataset", "token_dtype", "split", "text", "stride")
TASK_KEYS = ("limit", "num_fewshot", "chat", "include_path", "unsafe_code")
MAX_BLOCKS = 64  # enough to know the standard error to 9%, and each as long as possible


@dataclass
class EvaluateConfig(ModelKeys):
    """The model to evaluate, and the data or the tasks."""

    dataset: str | None = key(None, "a folder, a name under data/, a mixture; None: the run's own", group="Loss")
    token_dtype: TokenDtype | None = key(None, "dtype of ids in files that do not state it; None: uint16, as nanoGPT")
    split: Literal["val", "train"] = key("val", "split to evaluate, all of it")
    text: str | None = key(None, "a UTF-8 file to evaluate on instead")
    stride: int = key(0, "tokens by which windows advance, and targets of each; 0: block_size", ge=0)

    tasks: str | None = key(None, "tasks of lm-evaluation-harness instead: hellaswag,lambada_openai", group="Tasks")
    limit: int | None = key(None, "examples of each task; None: all", ge=1)
    num_fewshot: int | None = key(None, "solved examples before each; None: as the task says", ge=0)
    chat: bool = key(False, "put each example into the model's chat template")
    include_path: str | None = key(None, "folder with tasks of your own as YAML files")
    unsafe_code: bool = key(False, "let tasks run code that the model writes")

    json: str | None = key(None, "also write the results to this file", group="Machine")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "autocast dtype; weights stay float32; auto: on a CPU the faster one, by a trial"
    )


def main() -> None:
    config, explicit = parse(EvaluateConfig, description="Evaluate a trained GPT.")
    validate(config, explicit)
    with explain_errors("too little memory: try --dtype=bfloat16, or a machine with more"):
        world = distributed.start(config.device, config.dtype)
        loaded = load_model(config, "evaluating")
        c = loaded.model.config
        world = try_dtypes(world, config.dtype, MAX_TOKENS_PER_PASS, c.n_embd, c.n_inner)
        print(f"computing in {describe_dtype(world)}", file=sys.stderr)
        if config.tasks:
            from nanogpt.interop.lm_eval_tasks import run_tasks

            # Some tasks import Hugging Face's `evaluate` and must not find this file.
            sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
            options = {name: getattr(config, name) for name in TASK_KEYS}
            results = run_tasks(config.tasks, loaded.model, loaded.tokenizer, world, **options)
        else:
            loaded.model.to(world.device).eval()
            if world.device.type == "cpu":
                use_cpu_kernels(loaded.model)
            if config.text:
                name, tokens = open_text(config.text, loaded.tokenizer)
            else:
                name, tokens = open_split(config, loaded)
            loss, stderr, num_targets = split_loss(loaded.model, tokens, config.stride, world)
            results = print_loss(name, tokens, loss, stderr, num_targets)
    if config.json:
        write_report("json", config.json, {"model": loaded.source} | results)


def validate(config: EvaluateConfig, explicit: ExplicitKeys) -> None:
    """Raise InputError for keys that would have no effect, and for files and packages that are missing."""
    if config.tasks:
        unused = dict.fromkeys(LOSS_KEYS, "tasks bring their own texts")
    else:
        unused = dict.fromkeys(TASK_KEYS, "has no effect without --tasks")
    if config.text:
        unused |= dict.fromkeys(("dataset", "token_dtype", "split"), f"--text={config.text} takes its place")
    problems = [f"--{name}: {reason}; leave it out" for name, reason in unused.items() if name in explicit]
    problems += find_two_sources(config, explicit)

    problems += [f"--{name} is empty; leave it out" for name in ("tasks", "text") if getattr(config, name) == ""]
    if world_size() > 1:
        problems.append("evaluation runs in one process; start it by `python evaluate.py`, without torchrun")
    missing = [name for name in ("lm_eval", "accelerate") if config.tasks and find_spec(name) is None]
    if missing:
        problems.append(f'--tasks={config.tasks}: {missing[0]} is not installed; run pip install -e ".[eval]"')
    if config.text and not os.path.exists(config.text):
        problems.append(f"--text={config.text}: could not be read (no such file); check its name")
    if config.include_path and not Path(config.include_path).is_dir():
        problems.append(f"--include_path={config.include_path}: is not a folder; give one that holds YAML files")
    if config.json:
        try:
            check_report("json", config.json)
        except InputError as error:
            problems.append(str(error))
    raise_problems(problems)
    if config.dataset:  # before the model is downloaded
        open_dataset(config.dataset, block_size=1, splits=[config.split], token_dtype=config.token_dtype)


# --- Loss


def open_split(config: EvaluateConfig, loaded: LoadedModel) -> tuple[str, Tokens]:
    """Open the split to evaluate on, and name it. Documents are masked as in the model's training.

    Raises InputError if the dataset is unknown, or belongs to another model.
    """
    name = config.dataset or loaded.train_config.get("dataset")
    if not name:
        raise InputError("--dataset is unknown: the model does not state it; give --dataset=NAME or --text=FILE")
    vocab_size = loaded.model.config.vocab_size
    dtype = config.token_dtype or (None if config.dataset else loaded.train_config.get("token_dtype"))
    dataset = open_dataset(name, block_size=1, vocab_size=vocab_size, splits=[config.split], token_dtype=dtype)
    if dataset.tokenizer and dataset.tokenizer.vocab != loaded.tokenizer.vocab:
        raise InputError(
            f"--dataset={name}: its tokenizer is not the model's; prepare its text with the model's tokenizer, or "
            "evaluate on the text by --text=FILE"
        )
    if loaded.train_config.get("mask_documents"):
        loaded.model.document_separator_id = dataset.end_of_text
    return f"{config.split} of {dataset.name}", getattr(dataset, config.split)


def open_text(file: str, tokenizer: Tokenizer) -> tuple[str, Tokens]:
    """Read a text as a split. Its first token is a target too if the tokenizer has an end of text to put before it."""
    text = read_text(file, f"--text={file}")
    ids = tokenizer.encode_ordinary(text)
    num_ids = len(ids)
    if tokenizer.end_of_text is not None:
        ids = np.insert(ids, 0, tokenizer.end_of_text)
    if len(ids) < 2:
        raise InputError(f"--text={file}: has no token to predict; give a longer text")
    tokens = Tokens.of(ids)
    tokens.bytes_per_token = len(text.encode()) / num_ids
    return file, tokens


def split_loss(model: GPT, tokens: Tokens, stride: int, world: World) -> tuple[float, float, int]:
    """Return the mean loss of a split in nats, its standard error (NaN for a single block), and the number of targets.

    Raises InputError for a stride above block_size, and if there are no targets.
    """
    block_size = model.config.block_size
    if stride > block_size:
        raise InputError(f"--stride={stride}: would skip tokens between windows; give --stride={block_size} or less")
    shares = [part.weight / (part.tokens - 1) for part in tokens.parts]
    sums = [block_sums(model, tokens, part, stride, world) for part in tokens.parts]
    nats, targets = sum(share * s.sum(1) for share, s in zip(shares, sums, strict=True))  # of all parts, by weight
    if not targets:
        raise InputError("the loss mask leaves no token to evaluate on; give another split")

    # The variance of a ratio of sums, to first order, is that of the blocks' nats above the mean loss.
    loss = nats / targets
    variance = 0.0
    for share, (block_nats, block_targets) in zip(shares, sums, strict=True):
        excess = share * (block_nats - loss * block_targets)
        variance += len(excess) * excess.var(ddof=1) if len(excess) > 1 else math.nan
    num_targets = sum(block_targets.sum() for _, block_targets in sums)
    return float(loss), math.sqrt(variance) / float(targets), int(num_targets)


@torch.inference_mode()
def block_sums(model: GPT, tokens: Tokens, part: MixturePart, stride: int, world: World) -> np.ndarray:
    """Return the summed loss in nats and the number of targets of each block of a part, (2, blocks)."""
    block_size = model.config.block_size
    windows_per_block = math.ceil((part.tokens - 1) / (block_size * MAX_BLOCKS))
    block_tokens = block_size * windows_per_block
    sums = np.zeros((2, math.ceil((part.tokens - 1) / block_tokens)))

    rows = rows_to_score(model, block_size)
    windows = SlidingWindows(tokens, part, block_size, stride or block_size, model.config.vocab_size, rows)
    for starts, x, y in tqdm(windows, unit="batch", disable=None):
        positions = starts[:, None] + np.arange(x.shape[1])
        blocks = positions[y.numpy() >= 0] // block_tokens
        x, y = world.to_device(x, y)
        has_target = y >= 0
        with world.autocast():
            # Only the targets' logits: each row of them is as large as the vocabulary.
            logits = model.logits(model.norm(model.hidden_states(x)[has_target])).float()
            nats = F.cross_entropy(logits, y[has_target], reduction="none")
        check_finite(nats)  # the softmax spreads a NaN to the whole row
        np.add.at(sums[0], blocks, nats.cpu().double().numpy())
        np.add.at(sums[1], blocks, 1)
    return sums


def print_loss(name: str, tokens: Tokens, loss: float, stderr: float, num_targets: int) -> dict[str, Any]:
    """Print the result of `split_loss`, and return it by names."""
    perplexity = math.exp(min(loss, 700))
    rows = [
        ("loss", loss, stderr, " nats per token"),
        ("perplexity", perplexity, perplexity * stderr, ""),
        ("bits_per_byte", tokens.bits_per_byte(loss), tokens.bits_per_byte(stderr), ""),
    ]
    print(f"{name}: {num_targets:,} tokens")
    results: dict[str, Any] = {"on": name, "tokens": num_targets}
    for metric, value, error, unit in rows:
        has_error = error is not None and not math.isnan(error)
        results[metric] = value
        results[f"{metric}_stderr"] = error if has_error else None
        if value is not None:
            spread = f" ± {error:.4f}" if has_error else ""
            print(f"{metric.replace('_', ' '):<15}{value:.4f}{spread}{unit}")
    return results


if __name__ == "__main__":
    run_script(main)
