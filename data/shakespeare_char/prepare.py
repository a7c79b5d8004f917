"""Tiny Shakespeare, one token a character: python data/shakespeare_char/prepare.py [--input=FILE] [--out=FOLDER]"""

from pathlib import Path

from nanogpt import run_script
from nanogpt.data import summary, tiny_shakespeare, write_text
from nanogpt.tokenizer import Tokenizer


def main() -> None:
    text, args = tiny_shakespeare(__doc__, Path(__file__).parent)
    print(summary(write_text(args.out, text, Tokenizer.characters(text))))


if __name__ == "__main__":
    run_script(main)
