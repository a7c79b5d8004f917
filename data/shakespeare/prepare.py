"""Tiny Shakespeare in GPT-2's encoding: python data/shakespeare/prepare.py [--input=FILE] [--out=FOLDER]

In the tokens of another model: --tokenizer=Qwen/Qwen3-0.6B --out=data/shakespeare_qwen3
"""

from pathlib import Path

from nanogpt.data.write import format_summary, tiny_shakespeare, write_text
from nanogpt.errors import run_script
from nanogpt.interop.huggingface import read_tokenizer
from nanogpt.text.tokenizer import Tokenizer


def main() -> None:
    told = "folder or Hugging Face id of the model whose tokenizer.json to use (default: GPT-2's encoding)"
    text, args = tiny_shakespeare(__doc__, Path(__file__).parent, tokenizer=told)
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else Tokenizer.gpt2()
    print(format_summary(write_text(args.out, text, tokenizer)))


if __name__ == "__main__":
    run_script(main)
