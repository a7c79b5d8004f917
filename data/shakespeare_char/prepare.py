"""Tiny Shakespeare, one token a character: python data/shakespeare_char/prepare.py [--input=FILE] [--out=FOLDER]"""

from dataclasses import dataclass
from pathlib import Path

from configurator import key, parse
from nanogpt.data.write import format_summary, read_tiny_shakespeare, write_text
from nanogpt.errors import run_script
from nanogpt.text.omissions import Omissions
from nanogpt.text.tokenizer import Tokenizer


@dataclass
class ShakespeareCharConfig:
    """Text to prepare, and where."""

    input: str = key("", "your own UTF-8 text, instead of the download")
    out: str = key(str(Path(__file__).parent), "folder to write to")


def main() -> None:
    config, _ = parse(ShakespeareCharConfig, description="Prepare Tiny Shakespeare, one token a character.")
    omissions = Omissions()
    text = read_tiny_shakespeare(config.input, Path(config.out), omissions)
    print(f"{config.out}: {len(text):,} characters")
    print(format_summary(write_text(config.out, text, Tokenizer.characters(text), omissions)))


if __name__ == "__main__":
    run_script(main)
