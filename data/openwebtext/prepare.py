"""OpenWebText in GPT-2's encoding: python data/openwebtext/prepare.py [--docs=N] [--input FILE ...] [--workers=N]

8,013,769 documents, about nine billion tokens, in 80 parquet files that are fetched, checked, tokenized and deleted one
after the other. An interrupted run goes on where it stopped. What is written does not depend on the number of workers.

Any other dataset of parquet files on the hub with a column `text`, such as ten billion tokens of FineWeb:
python data/openwebtext/prepare.py --repo=HuggingFaceFW/fineweb --under=sample/10BT --out=data/fineweb
"""

import argparse
import os
from pathlib import Path

from nanogpt.data.write import format_summary
from nanogpt.errors import run_script
from nanogpt.text.prepare import check_numbers, earlier, prepare
from nanogpt.text.sources import ReadOptions, find, hub_files


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare OpenWebText, or documents of your own, in GPT-2's encoding.")
    parser.add_argument("--docs", type=int, help="take only so many documents (default: all)")
    parser.add_argument("--input", nargs="+", help="files of your own, instead of the download")
    parser.add_argument("--repo", default="Skylion007/openwebtext", help="a dataset on the hub (default: %(default)s)")
    parser.add_argument("--under", default="", help="take only its files whose path begins so")
    parser.add_argument("--val-share", type=float, default=0.0005, help="part of the documents for val")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this script)")
    args = parser.parse_args()
    check_numbers(args.val_share, args.workers, args.docs)
    sources = find(args.input) if args.input else hub_files(args.repo, args.under, earlier(args.out))
    meta = prepare(
        args.out, sources, "gpt2", reading=ReadOptions(), val_share=args.val_share, workers=args.workers, most=args.docs
    )
    print(f"{args.out}\n{format_summary(meta)}")


if __name__ == "__main__":
    run_script(main)
