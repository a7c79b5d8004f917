"""Write text with a trained GPT: python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"

Weights come from a run of train.py, or with --init_from from GPT-2, a Hugging Face folder or nanoGPT's ckpt.pt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import key, parse
from model import GPT
from nanogpt import InputError, checkpoint, data, distributed, run_script
from nanogpt.inference import generate
from nanogpt.pretrained import GPT2_VOCAB, read_weights
from nanogpt.tokenizer import Tokenizer


@dataclass
class SampleConfig:
    """What to sample from, and how."""

    init_from: str = key(
        "resume", "resume: out_dir's run; or gpt2*, a hub id, a folder, nanoGPT's ckpt.pt", group="Model"
    )
    out_dir: str = key("out", "folder of the run")
    checkpoint: str = key("best", "of the run: best, latest, step-NNNNNN or its folder")

    start: str = key("\n", "the prompt; FILE:prompt.txt reads it from a file", group="Text")
    num_samples: int = key(10, "texts to write, all at once", least=1)
    max_new_tokens: int = key(500, "tokens in each of them", least=1)
    temperature: float = key(0.8, "1 = the model's own odds, less = safer, 0 = always the likeliest token", least=0)
    top_k: int | None = key(200, "draw from this many likeliest tokens only; None: from all", least=1)
    seed: int = key(1337, "seed of the draws", least=0)

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of matrix products")
    compile: Literal["auto", True, False] = key(False, "torch.compile; pays only for very long texts")


def main() -> None:
    config, _ = parse(SampleConfig, description="Write text with a trained GPT.")
    world = distributed.start(config.device, config.dtype)
    prompt = read_prompt(config.start)
    model, tokenizer = load(config)
    model.to(world.device).eval()
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("start is empty: give a prompt with --start=TEXT or --start=FILE:prompt.txt")
    if max(ids) >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer's ids go beyond the model's {model.config.vocab_size}: it belongs to another model"
        )
    idx = torch.tensor([ids], device=world.device).repeat(config.num_samples, 1)  # (num_samples, T)
    generator = torch.Generator(world.device).manual_seed(config.seed)
    network = torch.compile(model, dynamic=True) if config.compile is True else model
    with world.autocast():
        new = list(
            generate(
                network,  # type: ignore[arg-type]
                idx,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                vocab_size=tokenizer.vocab_size,
                generator=generator,
            )
        )
    for row in torch.cat([idx, *new], dim=1).tolist():
        print(tokenizer.decode(row), "---------------", sep="\n")


def read_prompt(start: str) -> str:
    """The prompt, from its file if `start` is FILE:path. Raises InputError where that cannot be read."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"start={start}: cannot be read as UTF-8 text ({error}); give another file") from error


def load(config: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model and its tokenizer; says what had to be assumed. Raises InputError where either is missing."""
    from_run = config.init_from == "resume"
    folder: Path | None
    source = Path(config.out_dir if from_run else config.init_from)
    if checkpoint.is_ours(source) or (from_run and not (source / "ckpt.pt").exists()):
        folder = checkpoint.find(source, config.checkpoint)
        print(f"sampling from {folder}")
        model = GPT.from_checkpoint(folder)
    else:
        weights = read_weights(source if from_run else config.init_from)
        print(*weights.notes, sep="\n")
        model = GPT.from_pretrained(weights, dropout=0.0)
        folder = weights.tokenizer_folder
        if folder is None and not weights.gpt2_encoding and weights.train_config.get("dataset"):
            folder = data.resolve(weights.train_config["dataset"])  # nanoGPT keeps characters beside the data
    tokenizer = Tokenizer.load(folder) if folder else None
    if tokenizer is None and model.config.vocab_size != GPT2_VOCAB:
        raise InputError(
            f"{source} has no tokenizer, and {model.config.vocab_size} ids are not GPT-2's: put the tokenizer.json of "
            "its data beside it"
        )
    return model, tokenizer or Tokenizer.gpt2()


if __name__ == "__main__":
    run_script(main)
