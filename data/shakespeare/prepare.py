"""Tiny Shakespeare in GPT-2's encoding: python data/shakespeare/prepare.py [--input=FILE] [--out=FOLDER]"""

import argparse
from pathlib import Path

from nanogpt import run_script
from nanogpt.data import fetch, read_text, summary, write_text
from nanogpt.tokenizer import Tokenizer

HERE = Path(__file__).parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare Tiny Shakespeare, or any text, in GPT-2's encoding.")
    parser.add_argument("--input", type=Path, help="a UTF-8 text at hand, instead of the download")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this script)")
    args = parser.parse_args()
    tokenizer = Tokenizer.gpt2()
    text = read_text(args.input or fetch(URL, args.out / "input.txt", SHA256))
    print(f"{args.out}: {len(text):,} characters")
    print(summary(write_text(args.out, text, tokenizer)))


if __name__ == "__main__":
    run_script(main)
