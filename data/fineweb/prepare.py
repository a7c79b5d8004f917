"""FineWeb in GPT-2's encoding, by datatrove: python data/fineweb/prepare.py [--workers=16] [--slurm=PARTITION]

Takes the 10 billion tokens of FineWeb-Edu's sample unless told otherwise; docs/scaling.md has the sizes and times.
The same command goes on where the last one stopped. With --slurm it queues the tasks and ends; run it again with --join
when they are done.
"""

import argparse
from pathlib import Path

from nanogpt.data.write import format_summary
from nanogpt.errors import InputError, run_script
from nanogpt.text.pipeline import Shards, join
from nanogpt.text.prepare import check_numbers, known_tokenizer


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--input", default="hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT", help="folder of parquet files")
    add("--out", type=Path, default=Path(__file__).parent, help="folder to write to, shared by all machines")
    add("--tokenizer", default="gpt2", help="gpt2 or others of tiktoken's, a tokenizer.json, a hub id")
    add("--val_share", type=float, default=0.001, help="part for validation, by hash (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a file (default: %(default)s)")
    add("--tasks", type=int, default=64, help="parts that are done, or done again, as a whole (default: %(default)s)")
    add("--workers", type=int, default=2, help="tasks at a time (default: %(default)s)")
    add("--slurm", metavar="PARTITION", help="queue the tasks there")
    add("--join", action="store_true", help="only put together what the tasks made")
    args = parser.parse_args()
    check_numbers(args.val_share, min(args.workers, args.tasks), shard_tokens=args.shard_tokens)
    tokenizer = known_tokenizer(args.tokenizer)
    if not args.join:
        try:
            from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
            from datatrove.pipeline.readers import ParquetReader
        except ImportError as error:
            raise InputError(f"it needs datatrove ({error}): run `pip install -e .[scale]`") from error
        steps = [ParquetReader(args.input, glob_pattern="**/*.parquet"), None]
        steps[1] = Shards(args.out, tokenizer, args.val_share, args.shard_tokens)
        shared = {"pipeline": steps, "tasks": args.tasks, "logging_dir": str(args.out / "preparing" / "logs")}
        if args.slurm:
            more = {"time": "24:00:00", "partition": args.slurm, "job_name": "prepare"}
            SlurmPipelineExecutor(**shared, **more, workers=args.workers).run()
            return
        LocalPipelineExecutor(**shared, workers=args.workers).run()
    print(f"{args.out}\n{format_summary(join(args.out, tokenizer))}")


if __name__ == "__main__":
    run_script(main)
