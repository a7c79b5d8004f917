"""Hand a model to other programs: python export.py --out_dir=out-shakespeare-char --to=exports/shakespeare

The folder is one of Hugging Face's: transformers loads it and what builds on transformers, and --init_from here does.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from configurator import key, parse
from model import GPT
from nanogpt import checkpoint
from nanogpt.console import format_bytes
from nanogpt.errors import InputError, run_script
from nanogpt.files import read_json
from nanogpt.interop.huggingface import write_huggingface
from nanogpt.text.tokenizer import Tokenizer
from sample import SampleConfig, load


@dataclass
class ExportConfig:
    """What to export, and where to."""

    init_from: str = key(
        "resume", "resume: out_dir's run; or gpt2*, a hub id, a folder, nanoGPT's ckpt.pt", group="Model"
    )
    out_dir: str = key("out", "folder of the run")
    checkpoint: str = key("best", "of the run: best, latest, step-NNNNNN or its folder")

    to: str = key("", "folder to write, which is not there yet or empty", group="Folder")
    dtype: Literal["float32", "bfloat16"] = key("float32", "of the weights in it")
    shard_gb: float = key(5.0, "more gigabytes of weights than these are split into several files", gt=0)


def main() -> None:
    config, _ = parse(ExportConfig, description="Write a trained GPT as a Hugging Face folder.")
    source, which = Path(config.out_dir if config.init_from == "resume" else config.init_from), config.checkpoint
    found = checkpoint.find(source, which) if checkpoint.is_checkpoint(source) else None
    with atomic_directory(config.to) as folder:
        # By its path, because a run that goes on may have a better one in a moment.
        which = str(found or which)
        named = SampleConfig(init_from=config.init_from, out_dir=config.out_dir, checkpoint=which)
        model, tokenizer = load(named, "exporting")
        ids, rows = tokenizer.vocab_size, model.config.vocab_size
        if ids > rows:
            raise InputError(f"{source}: the tokenizer has {ids} ids, the model {rows}: it belongs to another model")
        write_huggingface(
            folder,
            asdict(model.config),
            model.state_dict(),
            dtype=getattr(torch, config.dtype),
            shard_bytes=config.shard_gb * 1e9,
            end_of_text=tokenizer.end_of_text,
        )
        tokenizer.save_pretrained(folder, model.config.block_size)
        facts = {"weights": config.dtype} | (run_facts(found) if found else {"taken from": source.name})
        card = model_card(Path(os.path.abspath(config.to)).name, model, tokenizer, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {config.to}: {model.count_parameters():,} parameters in {config.dtype}, {format_bytes(total)}")


@contextlib.contextmanager
def atomic_directory(to: str) -> Iterator[Path]:
    """An empty folder beside `to`, which is synced to disk and takes its name at the end, and is deleted if the block
    raises. Raises InputError where there is something at `to` already, or the disk does not take the files."""
    if not to:
        raise InputError("to is empty: say where to write, with --to=FOLDER")
    final = Path(os.path.abspath(to))
    partial = final.with_name(final.name + ".partial")
    made: list[Path] = []  # the deepest first
    try:
        is_empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
        if os.path.lexists(final) and not is_empty:
            raise InputError(f"to={to} is there already and is not overwritten: delete it, or give another --to")
        missing = [path for path in partial.parents if not path.exists()]
        partial.mkdir(parents=True)
        made = [partial, *missing]
        yield partial
        for path in (*partial.iterdir(), partial):
            if path.is_file() or os.name == "posix":  # elsewhere a folder cannot be opened
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        if is_empty:
            final.rmdir()
        partial.rename(final)
        made = []
    except FileExistsError as error:
        raise InputError(
            f"{error.filename} is there: wait for the export that writes it, or delete what one has left"
        ) from error
    except (OSError, SafetensorError) as error:  # the latter stands for any fault of the disk
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"to={to} could not be written ({reason}): make room, or give another --to") from error
    finally:
        with contextlib.suppress(OSError):  # another export may have begun in the same parent
            for path in made:
                shutil.rmtree(path) if path == partial else path.rmdir()


def run_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint knows of its run, for the model card."""
    state = read_json(folder / "state.json")
    began, dataset = state["config"].get("init_from", "scratch"), state["config"].get("dataset")
    facts = {"dataset": Path(dataset).name} if isinstance(dataset, str) else {}
    facts |= {} if began == "scratch" else {"trained on from": began}
    facts |= {"steps": f"{state['step']:,}", "tokens": f"{state['samples'] * state['model']['block_size']:,}"}
    loss = state["val_loss"]  # None: not evaluated at this step
    return facts | ({} if loss is None else {"validation loss": f"{loss:.4f} nats per token"})


def model_card(name: str, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any]) -> str:
    """README.md of an exported folder: what is known of the model, and how to load it."""
    c = model.config
    kind, end = ("GPT-2", "") if c.arch == "gpt2" else ("Qwen3", f", {c.n_kv_head} of them for keys, {c.head_dim} wide")
    sizes = {
        "architecture": f"{kind}'s, {'tied' if c.tied else 'untied'} output layer",
        "parameters": f"{model.count_parameters():,}",
        "layers": c.n_layer,
        "heads": f"{c.n_head}{end}",
        "channels": f"{c.n_embd}, {c.n_inner} in the MLP",
        "context": f"{c.block_size:,} tokens",
        "vocabulary": f"{c.vocab_size:,} ids, tokenizer {tokenizer.name}",
    }
    rows = "\n".join(f"| {what} | {value} |" for what, value in (sizes | facts).items())
    is_char = tokenizer.name == "char"
    start = tokenizer.decode([tokenizer.vocab_size // 2]) if is_char else "The"
    limits = "It continues text, and has no format for chats."
    if is_char:
        limits += f" It knows {tokenizer.vocab_size} characters; a text with any other is refused by its tokenizer."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT written by nanoGPT's export.py. {limits}

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer({start!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

`transformers serve {name}` answers clients of OpenAI's API at `/v1/completions`; prompt and `max_tokens` together must
fit into the context. `python sample.py --init_from={name}` samples from it, `python train.py --init_from={name}` trains
it on.
"""


if __name__ == "__main__":
    run_script(main)
