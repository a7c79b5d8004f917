"""Tiny Shakespeare in GPT-2's encoding: python data/shakespeare/prepare.py [--input=FILE] [--out=FOLDER]

In the tokens of another model: --tokenizer=Qwen/Qwen3-0.6B --out=data/shakespeare_qwen3
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import key, parse
from nanogpt.data.write import format_summary, read_tiny_shakespeare, write_text
from nanogpt.errors import run_script
from nanogpt.interop.huggingface import find_tokenizer
from nanogpt.text.omissions import Omissions


@dataclass
class ShakespeareConfig:
    """Text to prepare, and where."""

    input: str = key("", "your own UTF-8 text, instead of the download")
    out: str = key(str(Path(__file__).parent), "folder to write to")
    tokenizer: str = key("gpt2", "an encoding of tiktoken's, a tokenizer.json or .gguf, a hub id")


def main() -> None:
    config, _ = parse(ShakespeareConfig, description="Prepare Tiny Shakespeare.")
    omissions = Omissions()
    text = read_tiny_shakespeare(config.input, Path(config.out), omissions)
    print(f"{config.out}: {len(text):,} characters")
    print(format_summary(write_text(config.out, text, find_tokenizer(config.tokenizer), omissions)))


if __name__ == "__main__":
    run_script(main)
