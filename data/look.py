"""What a dataset holds: python data/look.py data/mine [--split=val]

And what the model saw: python data/look.py data/mine --run=out --step=100 shows the rows of that update.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import checkpoint
from nanogpt.data.dataset import Dataset, Tokens, open_dataset
from nanogpt.data.rows import Rows
from nanogpt.errors import InputError, run_script
from nanogpt.files import read_json
from nanogpt.text.tokenizer import Tokenizer

BLOCK = 2**22  # tokens read at once
BAR = 40  # characters of the longest one
COUNTED = ("\033[7m", "\033[0m")  # around what the loss looks at, in a terminal: reversed colors
# What decides on the rows of a step; the defaults are train.py's.
KEYS = {"seed": 1337, "batch_size": 12, "gradient_accumulation_steps": 40, "block_size": 1024, "row_order": "random"}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("dataset", nargs="?", help="a folder, a name under data/, or a mixture (default: that of --run)")
    add("--split", choices=("train", "val"), default="train", help="(default: %(default)s)")
    add("--count", type=int, default=100_000_000, help="tokens to count, evenly spread (default: %(default)s)")
    add("--windows", type=int, default=3, help="random windows to show (default: %(default)s)")
    add("--length", type=int, default=100, help="tokens to show of each window or row (default: %(default)s)")
    add("--seed", type=int, help="of the random windows; of the rows of a step (default: that of --run, or 1337)")
    add("--run", type=Path, help="out_dir of a run, whose settings decide on the rows of a step")
    add("--step", type=int, help="show the rows of the update after this many")
    for name in list(KEYS)[1:]:
        add(f"--{name}", type=type(KEYS[name]), help="of a step without --run")
    args = parser.parse_args()
    if min(args.count, args.length, args.windows + 1, (args.step or 0) + 1) < 1:
        raise InputError("--count and --length count from 1 up, --windows and --step from 0")
    settings: dict[str, Any] = KEYS
    if args.run:
        settings = read_json(checkpoint.find(args.run, "latest") / "state.json")["config"]
    settings = settings | {name: getattr(args, name) for name in KEYS if getattr(args, name) is not None}
    if settings["row_order"] not in ("random", "epoch"):
        raise InputError(f"--row_order={settings['row_order']}: it is random or epoch")
    name = args.dataset or settings.get("dataset")
    if not name:
        raise InputError("no dataset was named: give a folder, or a run by --run=OUT_DIR")
    is_step = args.step is not None
    split = "train" if is_step else args.split
    dataset = open_dataset(name, block_size=settings["block_size"] if is_step else 1, splits=[split])
    tokenizer = dataset.tokenizer or Tokenizer.gpt2()  # which nanoGPT's folders without any file are of
    tokens = getattr(dataset, split)
    if is_step:
        show_step(tokens, tokenizer, args.step, settings, args.length)
        return
    described(dataset, split, tokens, tokenizer)
    counted(dataset, tokens, tokenizer, args.count)
    draw = np.random.default_rng(args.seed)
    for start in sorted(draw.integers(0, max(1, len(tokens) - args.length), args.windows).tolist()):
        print(f"\n--- {place(tokens, start)}\n{text_at(tokens, tokenizer, start, start + args.length)}")


def described(dataset: Dataset, split: str, tokens: Tokens, tokenizer: Tokenizer) -> None:
    facts = dataset.meta.get("splits", {}).get(split, {})
    told = [f"{len(tokens):,} tokens", f"{len(tokens.shards):,} files" if len(tokens.shards) > 1 else ""]
    told += [f"{facts['documents']:,} documents" if "documents" in facts else ""]
    told += [f"{tokens.bytes_per_token:.3f} bytes of text a token" if tokens.bytes_per_token else ""]
    print(f"{dataset.name}, {split}: {', '.join(filter(None, told))}")
    kind = dataset.meta.get("tokenizer") or ("read as GPT-2's" if dataset.tokenizer is None else tokenizer.name)
    print(f"vocabulary: {dataset.vocab_size or tokenizer.vocab_size:,} ids ({kind})")


def counted(dataset: Dataset, tokens: Tokens, tokenizer: Tokenizer, most: int) -> None:
    """The most frequent tokens, and how long documents are; of up to about `most` tokens in evenly spread blocks."""
    starts = range(0, len(tokens), max(BLOCK, BLOCK * math.ceil(len(tokens) / max(most, BLOCK))))
    counts, lengths, looked_at = np.zeros(0, dtype=np.int64), [], 0
    before, end = -1, 0  # where the last document ended; where the last block did
    for start in starts:
        ids = tokens[start : start + BLOCK]
        new = np.bincount(ids, minlength=len(counts))
        new[: len(counts)] += counts
        counts = new
        if tokens.masked:
            looked_at += int(np.count_nonzero(tokens.mask(start, start + len(ids))))
        ends = start + np.flatnonzero(ids == (-1 if dataset.end_of_text is None else dataset.end_of_text))
        if start > end:  # a gap, in which documents may end
            before, ends = (ends[0], ends[1:]) if len(ends) else (None, ends)
        if len(ends):
            lengths.append(np.diff(ends, prepend=[] if before is None else [before]))
            before = ends[-1]
        end = start + len(ids)
    total = int(counts.sum())
    if total < len(tokens):
        print(f"counted: {total:,} tokens, evenly spread")
    if tokens.masked:
        print(f"the loss looks at {100 * looked_at / total:.1f}% of the tokens")
    if unused := (dataset.vocab_size or len(counts)) - int(np.count_nonzero(counts)):
        print(f"ids that do not occur: {unused:,}")
    print("\nmost frequent tokens")
    for token_id in np.argsort(-counts, kind="stable")[:20].tolist():
        if counts[token_id]:
            print(f"{100 * counts[token_id] / total:7.3f}%  {token_id:>6}  {tokenizer.label(token_id)!r}")
    if lengths:
        histogram(np.concatenate(lengths))


def histogram(lengths: np.ndarray) -> None:
    """How many documents have 1, 2 to 3, 4 to 7 … tokens."""
    print(f"\nlengths of {len(lengths):,} documents in tokens: median {int(np.median(lengths)):,}, ", end="")
    print(f"mean {lengths.mean():,.1f}, longest {lengths.max():,}")
    bins = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    for power in range(int(np.flatnonzero(bins)[0]), len(bins)):
        bar = "█" * math.ceil(BAR * bins[power] / bins.max())
        print(f"{2**power:>12,} to {2 ** (power + 1) - 1:<12,} {bar} {bins[power]:,}")


def show_step(tokens: Tokens, tokenizer: Tokenizer, step: int, settings: dict[str, Any], length: int) -> None:
    """The rows of the update after `step`, which is right where the batch size never changed."""
    block_size, per_step = settings["block_size"], settings["batch_size"] * settings["gradient_accumulation_steps"]
    vocab_size = 2**32  # ids are not checked here
    rows = Rows(tokens, block_size, vocab_size, settings["seed"], settings["row_order"])
    starts = rows.starts(slice(step * per_step, (step + 1) * per_step))
    print(f"update {step:,} to {step + 1:,}: {per_step:,} rows of {block_size:,} tokens")
    for number, start in enumerate(starts.tolist(), step * per_step):
        told = f"\n--- row {number:,}: {place(tokens, start)}"
        if tokens.masked:
            share = np.mean(tokens.mask(start + 1, start + block_size + 1))
            told += f", {100 * share:.1f}% counted"
        print(f"{told}\n{text_at(tokens, tokenizer, start, start + min(length, block_size))}")


def place(tokens: Tokens, at: int) -> str:
    shard, first, _ = next(tokens.pieces(at, at + 1))
    return f"{shard.name}, token {first:,}"


def text_at(tokens: Tokens, tokenizer: Tokenizer, first: int, last: int) -> str:
    """The text of some tokens; where the loss looks at a part of them alone, with that marked."""
    ids, mask = tokens[first:last], tokens.mask(first, min(last, len(tokens)))
    if not tokens.masked:
        return tokenizer.decode(ids.tolist())
    begin, end = COUNTED if sys.stdout.isatty() else ("⟦", "⟧")
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    counts = bool(mask[0])
    told = []
    for run in runs:
        told.append(begin + tokenizer.decode(run.tolist()) + end if counts else tokenizer.decode(run.tolist()))
        counts = not counts
    return "".join(told)


if __name__ == "__main__":
    run_script(main)
