"""How good is a model? python evaluate.py --out_dir=out-shakespeare-char --split=val

Loss, perplexity and bits per byte of a whole split, or with --text=FILE of a text, for a run of train.py or with
--init_from for GPT-2, a Hugging Face folder or nanoGPT's ckpt.pt: every token counts once, the first alone being
given. Windows of block_size tokens stand side by side, so a token sees what its window shows of its past; with
--stride=N they advance by N, only the last N tokens of each count, and each token beyond the first window sees at least
block_size - N.

Behind each figure stands its standard error. A split is cut into 64 stretches of whole windows (or a window each, where
it has fewer), and the loss is the mean over these, weighted by the tokens of each that count; its error follows from
how far the stretches are apart, as if each were drawn by itself. (Single windows of one text are not: neighbors are
alike, and an error from them is too small by half on tiny Shakespeare.) Bits per byte follow by scaling, the first
token, which nothing predicts, taken at the mean of the others; perplexity to first order. In a mixture the sources
weigh by their shares.

--tasks=hellaswag,lambada_openai: the tasks of EleutherAI's lm-evaluation-harness instead (pip install -e ".[eval]").
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from configurator import key, parse
from model import GPT
from nanogpt import checkpoint, distributed
from nanogpt.data.dataset import Shard, Tokens, open_dataset
from nanogpt.data.rows import SlidingWindows
from nanogpt.distributed import World
from nanogpt.errors import InputError, run_script
from nanogpt.evaluation import score
from nanogpt.memory import rows_to_score
from nanogpt.text.tokenizer import Tokenizer
from sample import opened

OF_TASKS = ("limit", "num_fewshot", "include_path", "unsafe_code")
OF_LOSS = ("dataset", "split", "text", "stride")
BLOCKS = 64  # of a split, at most: enough to know the error to 9%, and each as long as can be
MEMORY = "too little memory: try --dtype=bfloat16, or a machine with more"


@dataclass
class EvaluateConfig:
    """What to evaluate, and on what."""

    init_from: str = key(
        "resume", "resume: out_dir's run; or gpt2*, a hub id, a folder, nanoGPT's ckpt.pt", group="Model"
    )
    out_dir: str = key("out", "folder of the run")
    checkpoint: str = key("best", "of the run: best, latest, step-NNNNNN or its folder")

    dataset: str | None = key(None, "a folder, a name under data/, a mixture; None: the run's own", group="Loss")
    split: Literal["val", "train"] = key("val", "which split of it, all of which is read")
    text: str | None = key(None, "a UTF-8 file to evaluate on instead")
    stride: int = key(0, "tokens by which windows advance, and that count in each; 0: block_size", ge=0)

    tasks: str | None = key(None, "lm-evaluation-harness's instead: hellaswag,lambada_openai", group="Tasks")
    limit: int | None = key(None, "examples of each task; None: all", ge=1)
    num_fewshot: int | None = key(None, "solved examples before each; None: as the task says", ge=0)
    include_path: str | None = key(None, "folder of YAML files with tasks of your own")
    unsafe_code: bool = key(False, "let tasks run the code that the model writes")

    json: str | None = key(None, "a file to write the results to, too", group="Machine")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of matrix products; weights stay float32")


def main() -> None:
    config, given = parse(EvaluateConfig, description="Tell how good a model is.")
    check(config, given)
    with distributed.explain_errors(MEMORY):
        world = distributed.start(config.device, config.dtype)
        model, tokenizer, source, run = opened(config, "evaluating")
        model.to(world.device).eval()
        if config.tasks:
            results = tell_tasks(config, model, tokenizer, world)
        else:
            tokens, name = read_text(config, tokenizer) if config.text else open_split(config, run, model, tokenizer)
            results = told_loss(name, tokens, *split_loss(model, tokens, config.stride, world))
    if config.json:
        results = {"model": source} | results
        try:
            Path(config.json).write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json={config.json}: cannot be written ({error.strerror}); give another file") from error


def check(config: EvaluateConfig, given: dict[str, Any]) -> None:
    """Raises InputError for keys that have no say in what is asked for, and for what is not there."""
    useless = dict.fromkeys(OF_LOSS, "tasks bring their own texts") if config.tasks else {}
    useless |= {} if config.tasks else dict.fromkeys(OF_TASKS, "is for --tasks alone")
    useless |= dict.fromkeys(("dataset", "split"), f"text={config.text} takes its place") if config.text else {}
    if config.init_from != "resume":
        of_run = ("out_dir",) if checkpoint.is_checkpoint(Path(config.init_from)) else ("out_dir", "checkpoint")
        useless |= dict.fromkeys(of_run, f"init_from={config.init_from} takes its place")
    faults = [f"{name}: {why}; leave it out" for name, why in useless.items() if name in given]
    if distributed.processes() > 1:
        faults.append("evaluation runs in one process: start it by `python evaluate.py`, without torchrun")
    if config.tasks is not None and not task_names(config):
        faults.append("tasks: names none; give --tasks=hellaswag, or leave it out")
    if config.text == "":
        faults.append("text: names no file; give --text=FILE, or leave it out")
    if config.tasks and find_spec("lm_eval") is None:
        faults.append(f"tasks={config.tasks}: lm_eval is not installed; run `pip install -e .[eval]`")
    if config.include_path and not Path(config.include_path).is_dir():
        faults.append(f"include_path={config.include_path}: is no folder; give one that holds tasks as YAML files")
    if config.json and not Path(config.json).absolute().parent.is_dir():
        faults.append(f"json={config.json}: its folder is not there; make it, or give another file")
    if config.json and Path(config.json).is_dir():
        faults.append(f"json={config.json}: is a folder; give a file")
    if faults:
        raise InputError("\n".join(faults))


# ---- loss


def open_split(config: EvaluateConfig, run: dict[str, Any], model: GPT, tokenizer: Tokenizer) -> tuple[Tokens, str]:
    """The split to evaluate on, and its name. Documents do not see one another where they did not in the run.
    Raises InputError where it is not known, or not for this model."""
    dataset = config.dataset or run.get("dataset")
    if not dataset:
        raise InputError("dataset: the model does not say what it was trained on; give --dataset=NAME or --text=FILE")
    found = open_dataset(dataset, block_size=1, vocab_size=model.config.vocab_size, splits=[config.split])
    if found.tokenizer and not found.tokenizer.same_as(tokenizer):
        raise InputError(
            f"dataset={dataset}: its ids are not those of the model's tokenizer; prepare its text with that one, or "
            "evaluate on the text itself by --text=FILE"
        )
    if run.get("mask_documents"):
        model.end_of_text = found.end_of_text
    return getattr(found, config.split), f"{config.split} of {found.name}"


def read_text(config: EvaluateConfig, tokenizer: Tokenizer) -> tuple[Tokens, str]:
    """A text as a split, and its name: after an end of text, where the tokenizer has one, so that the first token
    counts as well. Raises InputError where it cannot be read or is empty."""
    path = str(config.text)
    try:
        text = Path(path).read_bytes()
        ids = tokenizer.encode_ordinary(text.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text={path}: cannot be read as UTF-8 text ({error}); give another file") from error
    end = tokenizer.end_of_text
    after = ids if end is None else np.concatenate([np.array([end], dtype=ids.dtype), ids])
    if len(after) < 2:
        raise InputError(f"text={path}: has no token to predict; give a longer text")
    tokens = Tokens([Shard(path, len(after), lambda: after)])
    tokens.bytes_per_token = len(text) / len(ids)
    return tokens, path


def split_loss(model: GPT, tokens: Tokens, stride: int, world: World) -> tuple[float, float, int]:
    """The mean loss over a split in nats per token, its standard error (NaN: of one stretch there is none), and how
    many tokens count. stride: see above. Raises InputError for a stride beyond block_size, and where no token counts.
    """
    T, vocab_size = model.config.block_size, model.config.vocab_size
    if stride > T:
        raise InputError(f"stride={stride}: tokens between windows would not count; give --stride={T} or less")
    stride = stride or T
    parts = []  # of each source: a token's weight; nats and tokens that count in each stretch, (2, stretches)
    for source in tokens.sources:
        targets = source.tokens - 1
        stretch = T * -(-targets // (T * BLOCKS))  # tokens
        sums = np.zeros((2, -(-targets // stretch)))
        batches = SlidingWindows(tokens, source, T, stride, vocab_size, rows_to_score(model, T))
        for starts, x, y in tqdm(batches, unit="batch", disable=None):
            where = (starts[:, None] + np.arange(x.shape[1]))[y.numpy() >= 0] // stretch
            with world.autocast():
                logprobs, _ = score(model, *world.to_device(x, y))
            np.add.at(sums[0], where, -logprobs.cpu().double().numpy())
            np.add.at(sums[1], where, 1)
        parts.append((source.weight / targets, sums))
    nats, weight = sum(share * sums.sum(1) for share, sums in parts)
    if not weight:
        raise InputError("the loss mask leaves no token to evaluate on: give another split")
    loss, variance = nats / weight, 0.0
    for share, sums in parts:  # of a ratio of sums, to first order: that of what each stretch has above the mean
        above, n = share * (sums[0] - loss * sums[1]), sums.shape[1]
        variance += n * above.var(ddof=1) if n > 1 else math.nan
    return float(loss), math.sqrt(variance) / float(weight), int(sum(sums[1].sum() for _, sums in parts))


def told_loss(name: str, tokens: Tokens, loss: float, error: float, counted: int) -> dict[str, Any]:
    """Prints the result of `split_loss`, and returns it by names."""
    perplexity = float(np.exp(loss))
    figures = {
        "loss": (loss, error, " nats per token"),
        "perplexity": (perplexity, perplexity * error, ""),
        "bits_per_byte": (tokens.bits_per_byte(loss), tokens.bits_per_byte(error), ""),
    }
    results: dict[str, Any] = {"on": name, "tokens": counted}
    print(f"{name}: {counted:,} tokens")
    for what, (value, deviation, unit) in figures.items():
        spread = "" if deviation is None or math.isnan(deviation) else f" ± {deviation:.4f}"
        results |= {what: value, f"{what}_stderr": deviation if spread else None}
        if value is not None:
            print(f"{what.replace('_', ' '):<15}{value:.4f}{spread}{unit}")
    return results


# ---- tasks


def tell_tasks(config: EvaluateConfig, model: GPT, tokenizer: Tokenizer, world: World) -> dict[str, Any]:
    """Prints the harness's table of its tasks, and returns its results by names. Raises InputError for unknown ones."""
    if config.unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # without which the metric that runs the code refuses to
    with others_first():
        from lm_eval.utils import make_table

        from nanogpt import harness

        asked, options = harness.NanoGPTLM(model, tokenizer, world), {"limit": config.limit}
        options |= {"num_fewshot": config.num_fewshot, "confirm_run_unsafe_code": config.unsafe_code}
        found = harness.run_tasks(asked, task_names(config), config.include_path, **options)
        print(make_table(found))
        if found.get("groups"):
            print(make_table(found, "groups"))
    return {name: found.get(name) for name in ("results", "groups", "versions", "n-shot", "n-samples")}


def task_names(config: EvaluateConfig) -> list[str]:
    return [name.strip() for name in (config.tasks or "").split(",") if name.strip()]


@contextlib.contextmanager
def others_first() -> Iterator[None]:
    """Nothing is imported from this folder: some tasks import Hugging Face's `evaluate`, and would get this file."""
    kept, here = [*sys.path], Path(__file__).resolve().parent
    sys.path[:] = [path for path in kept if Path(path).resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = kept


if __name__ == "__main__":
    run_script(main)
