"""Any text becomes a dataset: python data/prepare.py --input PATH ... --out=data/mine [--tokenizer=gpt2]

A document is a file, a line of JSON lines or a row; each ends with the end of text, where the tokenizer has one. Some
are for validation, by their hash; of a single text it is the last tenth. Killed, the same command goes on.
"""

import argparse
import codecs
import os
from pathlib import Path

from nanogpt.data.write import format_summary
from nanogpt.errors import InputError, run_script
from nanogpt.text.fast_bpe import PATTERNS
from nanogpt.text.prepare import check_numbers, earlier, prepare
from nanogpt.text.sources import KNOWN, ReadOptions, find


def truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text == "True"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"{KNOWN}; folders, globs; hf:OWNER/NAME[@CONFIG][:SPLIT]")
    add("--out", type=Path, required=True, help="folder to write to, such as data/mine")
    add(
        "--tokenizer",
        default="gpt2",
        help="char, byte, bpe:8192 (trained on the text), gpt2 or others of tiktoken's, a tokenizer.json, a hub id",
    )
    add("--text_key", default="text", help="column of rows that holds the text (default: %(default)s)")
    add("--chat", type=truth, default=False, metavar="True|False", help="rows are conversations: messages, or prompt")
    add("--encoding", default="utf-8", help="of text files and JSON lines (default: %(default)s)")
    add("--skip_bad", type=truth, default=False, metavar="True|False", help="count bad rows and files, and go on")
    add("--docs", type=int, help="take only so many documents (default: all)")
    add("--val_share", type=float, help="part for validation (default: 0.01; of a single text 0.1)")
    add("--pattern", choices=PATTERNS, default="gpt2", help="how bpe:... cuts text into words (default: %(default)s)")
    add("--train_mb", type=float, default=100, help="MB of text that bpe:... is trained on (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a file (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    args = parser.parse_args()
    try:
        if not codecs.lookup(args.encoding)._is_text_encoding:
            raise LookupError
    except (LookupError, ValueError) as error:
        raise InputError(f"--encoding={args.encoding} is not known: utf-8, latin-1, cp1252, utf-16 …") from error
    check_numbers(args.val_share, args.workers, args.docs, args.shard_tokens)
    meta = prepare(
        args.out,
        find(args.input, earlier(args.out)),
        args.tokenizer,
        reading=ReadOptions(args.text_key, args.encoding, args.skip_bad, args.chat),
        val_share=args.val_share,
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        most=args.docs,
        train_mb=args.train_mb,
        pattern=args.pattern,
    )
    print(f"{args.out}\n{format_summary(meta)}")


if __name__ == "__main__":
    run_script(main)
