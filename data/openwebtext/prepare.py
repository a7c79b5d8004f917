"""OpenWebText in GPT-2's encoding: python data/openwebtext/prepare.py [--docs=N] [--input FILE ...] [--workers=N]

8,013,769 documents, about nine billion tokens, in 80 parquet files, which are downloaded, verified, tokenized and
deleted one after the other. After an interruption, run the same command again to resume.

Any other dataset of parquet files on the hub with a column `text`, such as ten billion tokens of FineWeb:
python data/openwebtext/prepare.py --repo=HuggingFaceFW/fineweb --under=sample/10BT --out=data/fineweb
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import key, parse
from nanogpt.console import available_cores
from nanogpt.data.write import format_summary
from nanogpt.errors import run_script
from nanogpt.text.omissions import Omissions
from nanogpt.text.prepare import find_earlier, prepare
from nanogpt.text.reading import ReadOptions
from nanogpt.text.sources import find_inputs, list_parquet


@dataclass
class OpenWebTextConfig:
    """Documents to prepare, and where."""

    input: list[str] = key([], "your own files, instead of the download", group="Input")
    repo: str = key("Skylion007/openwebtext", "a dataset on the hub")
    under: str = key("", "take only its files whose path begins with this")
    docs: int | None = key(None, "read only this many documents", ge=1)

    out: str = key(str(Path(__file__).parent), "folder to write to", group="Output")
    val_share: float = key(0.0005, "fraction of the documents for validation", gt=0, lt=1)
    workers: int = key(available_cores(), "processes; one for each core", ge=1)


def main() -> None:
    config, _ = parse(OpenWebTextConfig, description="Prepare OpenWebText, or your own documents.")
    out = Path(config.out)

    def choose(revision: str, paths: list[str], card: object) -> list[str]:
        chosen = [path for path in paths if path.startswith(config.under)]
        return [] if any("partial" in path for path in chosen) else chosen

    omissions = Omissions()
    if config.input:
        sources = find_inputs(config.input, omissions)
    else:
        sources = list_parquet(f"{config.repo}/{config.under}", config.repo, choose, find_earlier(out))
    meta = prepare(
        out,
        sources,
        "gpt2",
        options=ReadOptions(),
        val_share=config.val_share,
        workers=config.workers,
        limit=config.docs,
        omissions=omissions,
    )
    print(f"{out}\n{format_summary(meta)}")


if __name__ == "__main__":
    run_script(main)
