"""Tiny Shakespeare, one token a character: python data/shakespeare_char/prepare.py [--input=FILE] [--out=FOLDER]"""

from pathlib import Path

from nanogpt.data.write import format_summary, tiny_shakespeare, write_text
from nanogpt.errors import run_script
from nanogpt.text.tokenizer import Tokenizer


def main() -> None:
    text, args = tiny_shakespeare(__doc__, Path(__file__).parent)
    print(format_summary(write_text(args.out, text, Tokenizer.characters(text))))


if __name__ == "__main__":
    run_script(main)
