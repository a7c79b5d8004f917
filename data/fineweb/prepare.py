"""FineWeb in GPT-2's encoding, by datatrove: python data/fineweb/prepare.py [--workers=16] [--slurm=PARTITION]

The default is the 10 billion tokens of FineWeb-Edu's sample; docs/scaling.md has other sizes and times. After an
interruption, run the same command again to resume. With --slurm it queues the tasks and exits. With --machines=N it
runs a part of them, that of --machine=0 to N-1. When all tasks are done, run it again with --join.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import key, parse
from nanogpt.data.write import format_summary
from nanogpt.errors import InputError, run_script
from nanogpt.interop.huggingface import find_tokenizer
from nanogpt.text.pipeline import Shards, join


@dataclass
class FineWebConfig:
    """Documents to prepare, and the machines for it."""

    input: str = key("hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT", "folder of parquet files", group="Data")
    out: str = key(str(Path(__file__).parent), "folder to write to, shared by all machines")
    tokenizer: str = key("gpt2", "an encoding of tiktoken's, a tokenizer.json or .gguf, a hub id")
    val_share: float = key(0.001, "fraction for validation, by hash", gt=0, lt=1)
    shard_tokens: int = key(100_000_000, "tokens in a file", ge=1)

    tasks: int = key(64, "parts of the work; an interrupted one starts over", group="Machines", ge=1, le=10**6)
    workers: int = key(2, "tasks at a time", ge=1, le=1024)
    machines: int = key(1, "machines that divide the tasks among them, without Slurm", ge=1, le=10**6)
    machine: int = key(0, "number of this one, from 0", ge=0)
    slurm: str = key("", "Slurm partition to queue the tasks in")
    join: bool = key(False, "only join the output of the tasks")


def main() -> None:
    config, _ = parse(FineWebConfig, description="Prepare FineWeb, or other parquet files, by datatrove.")
    if config.machine >= config.machines:
        raise InputError(f"--machine={config.machine}: the machines are 0 to {config.machines - 1}, by --machines")
    out = Path(config.out)
    tokenizer = find_tokenizer(config.tokenizer)
    if not config.join:
        run_tasks(config, Shards(out, tokenizer, config.val_share, config.shard_tokens))
        if config.slurm or config.machines > 1:
            print("when all tasks are done: the same command with --join")
            return
    print(f"{out}\n{format_summary(join(out, tokenizer))}")


def run_tasks(config: FineWebConfig, shards: Shards) -> None:
    """Run this machine's tasks here, or queue all."""
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
        from datatrove.pipeline.readers import ParquetReader
    except ImportError as error:
        raise InputError(f'datatrove is not installed ({error}): run pip install -e ".[scale]"') from error

    steps = [ParquetReader(config.input, glob_pattern="**/*.parquet"), shards]
    settings = {"tasks": config.tasks, "workers": config.workers, "logging_dir": str(shards.out / "preparing/logs")}
    if config.slurm:
        queue = {"time": "24:00:00", "partition": config.slurm, "job_name": "prepare"}
        SlurmPipelineExecutor(pipeline=steps, **settings, **queue).run()
    else:
        first, last = (config.tasks * machine // config.machines for machine in (config.machine, config.machine + 1))
        part = {"local_rank_offset": first, "local_tasks": last - first}
        LocalPipelineExecutor(pipeline=steps, **settings, **part).run()


if __name__ == "__main__":
    run_script(main)
