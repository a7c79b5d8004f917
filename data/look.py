"""Show the contents of a dataset: python data/look.py data/mine [--split=val]

And the rows that a run trained on: python data/look.py data/mine --run=out --step=100 shows those of the update at step
100.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from configurator import key, parse
from nanogpt import checkpoint
from nanogpt.data.dataset import Dataset, Tokens, open_dataset
from nanogpt.data.rows import Rows
from nanogpt.data.token_shards import TokenDtype
from nanogpt.errors import InputError, run_script
from nanogpt.schedule import RowSchedule
from nanogpt.text.tokenizer import Tokenizer

BLOCK_TOKENS = 2**22  # counted at once
BAR_WIDTH = 40  # characters of the longest bar
BATCH_KEYS = ("batch_size", "gradient_accumulation_steps", "batch_growth_tokens", "block_size")
ROW_KEYS = ("seed", "row_order", *BATCH_KEYS)  # decide the rows of a step


@dataclass
class LookConfig:
    """Dataset, and tokens or rows to show."""

    dataset: str = key("", "a folder, a name under data/, or a mixture; default: that of --run", group="Dataset")
    token_dtype: TokenDtype | None = key(None, "as in train.py")
    split: Literal["train", "val"] = key("train", "split to show")
    count: int = key(100_000_000, "tokens to count, evenly spread", ge=1)
    windows: int = key(3, "random windows to show", ge=0, le=10**6)
    length: int = key(100, "tokens to show of each window or row", ge=1)
    seed: int | None = key(None, "of the windows, None: random; of the rows of a step, None: 1337", ge=0)

    step: int | None = key(None, "show the training rows of the update after this many", group="Step", ge=0)
    run: str = key("", "out_dir of a run, whose settings are the defaults of the keys below and of the seed")
    batch_size: int = key(12, "as in train.py", ge=1, le=2**20)
    gradient_accumulation_steps: int = key(40, "as in train.py", ge=1, le=2**20)
    batch_growth_tokens: int = key(0, "as in train.py", ge=0)
    block_size: int = key(1024, "as in train.py", ge=1)
    row_order: Literal["random", "epoch"] = key("random", "as in train.py")

    @property
    def row_schedule(self) -> RowSchedule:
        rows_per_step = self.batch_size * self.gradient_accumulation_steps
        return RowSchedule(self.batch_size, rows_per_step, self.batch_growth_tokens, self.block_size)


def main() -> None:
    config, explicit = parse(LookConfig, description="Show the contents of a dataset.", positional="dataset")
    if config.run:
        state = checkpoint.verify(checkpoint.find(Path(config.run), "latest"), [])
        for name in ("dataset", "token_dtype", *ROW_KEYS):
            if name not in explicit and name in state["config"]:
                setattr(config, name, state["config"][name])
        rows_read = config.row_schedule.total_rows(state["step"])
        if config.step is not None and rows_read != state["samples"] and explicit.keys().isdisjoint(BATCH_KEYS):
            raise InputError(f"--run={config.run}: its batch changed in a resume, so the rows of a step are not known")
    if not config.dataset:
        raise InputError("no dataset: give a folder, or a run with --run=OUT_DIR")

    is_step = config.step is not None
    split = "train" if is_step else config.split
    block_size = config.block_size if is_step else 1
    dataset = open_dataset(config.dataset, block_size=block_size, splits=[split], token_dtype=config.token_dtype)
    # nanoGPT's folders without meta.pkl are in GPT-2's encoding.
    tokenizer = dataset.tokenizer or Tokenizer.from_name_or_path("gpt2")
    tokens = getattr(dataset, split)
    if is_step:
        show_step(tokens, tokenizer, config)
        return
    show_summary(dataset, split, tokens, tokenizer)
    show_counts(dataset, tokens, tokenizer, config.count)
    rng = np.random.default_rng(config.seed)
    for start in sorted(rng.integers(0, max(1, len(tokens) - config.length), config.windows).tolist()):
        text = format_text(tokens, tokenizer, start, start + config.length)
        print(f"\n--- {format_place(tokens, start)}\n{text}")


def show_summary(dataset: Dataset, split: str, tokens: Tokens, tokenizer: Tokenizer) -> None:
    facts = [f"{len(tokens):,} tokens"]
    if len(tokens.shards) > 1:
        facts.append(f"{len(tokens.shards):,} files")
    documents = dataset.meta.get("splits", {}).get(split, {}).get("documents")
    if documents is not None:
        facts.append(f"{documents:,} documents")
    if tokens.bytes_per_token:
        facts.append(f"{tokens.bytes_per_token:.3f} bytes of text a token")
    print(f"{dataset.name}, {split}: {', '.join(facts)}")

    name = dataset.meta.get("tokenizer") or ("read as GPT-2's" if dataset.tokenizer is None else tokenizer.name)
    print(f"vocabulary: {dataset.vocab_size or tokenizer.vocab_size:,} ids ({name})")


def show_counts(dataset: Dataset, tokens: Tokens, tokenizer: Tokenizer, limit: int) -> None:
    """Print the most frequent tokens and the lengths of documents, of about `limit` tokens in evenly spread blocks."""
    stride = BLOCK_TOKENS * math.ceil(len(tokens) / max(limit, BLOCK_TOKENS))
    counts = np.zeros(0, dtype=np.int64)
    lengths = []
    targets = 0
    last_end = np.array([-1])  # the last token of the document before; empty after a gap between blocks
    for start in range(0, len(tokens), stride):
        ids = tokens[start : start + BLOCK_TOKENS]
        tokens.check_ids(start, start + len(ids), max(dataset.vocab_size or 0, tokenizer.vocab_size))
        block_counts = np.bincount(ids, minlength=len(counts))
        block_counts[: len(counts)] += counts
        counts = block_counts
        if tokens.has_mask:
            targets += int(np.count_nonzero(tokens.mask(start, start + len(ids))))

        if start and stride > BLOCK_TOKENS:
            last_end = last_end[:0]
        if dataset.end_of_text is not None:
            ends = np.append(last_end, start + np.flatnonzero(ids == dataset.end_of_text))
            lengths.append(np.diff(ends))
            last_end = ends[-1:]

    total = int(counts.sum())
    if total < len(tokens):
        print(f"counted: {total:,} tokens, evenly spread")
    if tokens.has_mask:
        print(f"targets of the loss: {100 * targets / total:.1f}% of the tokens")
    unused = (dataset.vocab_size or len(counts)) - int(np.count_nonzero(counts))
    if unused:
        print(f"ids that do not occur: {unused:,}")
    print("\nmost frequent tokens")
    for token_id in np.argsort(-counts, kind="stable")[:20].tolist():
        if counts[token_id]:
            print(f"{100 * counts[token_id] / total:7.3f}%  {token_id:>6}  {tokenizer.label(token_id)!r}")
    if any(map(len, lengths)):
        show_histogram(np.concatenate(lengths))


def show_histogram(lengths: np.ndarray) -> None:
    """Print how many documents have 1, 2 to 3, 4 to 7 … tokens."""
    print(f"\nlengths of {len(lengths):,} documents in tokens: median {int(np.median(lengths)):,}, ", end="")
    print(f"mean {lengths.mean():,.1f}, longest {lengths.max():,}")
    bins = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    for power in range(int(np.flatnonzero(bins)[0]), len(bins)):
        bar = "█" * math.ceil(BAR_WIDTH * bins[power] / bins.max())
        print(f"{2**power:>12,} to {2 ** (power + 1) - 1:<12,} {bar} {bins[power]:,}")


def show_step(tokens: Tokens, tokenizer: Tokenizer, config: LookConfig) -> None:
    """Print the rows of the update after `step`."""
    assert config.step is not None
    seed = 1337 if config.seed is None else config.seed
    rows = Rows(tokens, config.block_size, 2**32, seed, config.row_order)  # 2**32: any id will do here
    first = config.row_schedule.total_rows(config.step)
    num_rows = config.row_schedule.rows_at(first)
    if first + num_rows >= 2**63:
        raise InputError(f"--step={config.step}: has rows of more than 63 bits; give less")
    print(f"update {config.step:,} to {config.step + 1:,}: {num_rows:,} rows of {config.block_size:,} tokens")
    for number in range(first, first + num_rows):
        start = int(rows.starts(slice(number, number + 1))[0])
        title = f"row {number:,}: {format_place(tokens, start)}"
        if tokens.has_mask:
            targets = np.mean(tokens.mask(start + 1, start + config.block_size + 1))
            title += f", {100 * targets:.1f}% targets"
        text = format_text(tokens, tokenizer, start, start + min(config.length, config.block_size))
        print(f"\n--- {title}\n{text}")


def format_place(tokens: Tokens, position: int) -> str:
    shard, first, _ = next(tokens.pieces(position, position + 1))
    return f"{shard.name}, token {first:,}"


def format_text(tokens: Tokens, tokenizer: Tokenizer, first: int, last: int) -> str:
    """The text of some tokens; if there is a loss mask, with the targets marked, in a terminal by reversed colors."""
    ids = tokens[first:last]
    if not tokens.has_mask:
        return tokenizer.decode(ids.tolist())
    start, end = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    mask = tokens.mask(first, min(last, len(tokens)))
    is_target = bool(mask[0])
    text = ""
    for run in np.split(ids, np.flatnonzero(np.diff(mask)) + 1):
        decoded = tokenizer.decode(run.tolist())
        text += f"{start}{decoded}{end}" if is_target else decoded
        is_target = not is_target
    return text


if __name__ == "__main__":
    run_script(main)
