"""Turn any text into a dataset: python data/prepare.py PATH ... --out=data/mine [--tokenizer=gpt2]

A document is a file, a line of JSON lines or a row. Each ends with the end-of-text token, if the tokenizer has one.
Some are for validation, by their hash; of a single text it is the last tenth. What is left out is printed, and is in
meta.json. After an interruption, run the same command again to resume.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import key, parse
from nanogpt.console import available_cores
from nanogpt.data.write import format_summary
from nanogpt.errors import InputError, run_script
from nanogpt.text.omissions import Omissions
from nanogpt.text.prepare import find_earlier, is_learned, prepare
from nanogpt.text.reading import ReadOptions
from nanogpt.text.sources import SUPPORTED, find_inputs
from nanogpt.text.tokenizer import Tokenizer


@dataclass
class PrepareConfig:
    """Text to prepare, and how."""

    input: list[str] = key([], f"{SUPPORTED}; folders, globs; hf:OWNER/NAME[@CONFIG][:SPLIT]", group="Input")
    text_key: str = key("text", "column of rows that holds the text")
    chat: bool = key(False, "rows are conversations, with messages, or with prompt and completion")
    encoding: str = key("utf-8", "encoding of text files and JSON lines")
    document_separator: str = key("", "split texts into documents at this string; \\n stands for a newline")
    skip_bad: bool = key(False, "count bad rows and files and leave them out, instead of an error")
    docs: int | None = key(None, "read only this many documents", ge=1)

    out: str = key("", "folder to write to, such as data/mine", group="Output")
    val_share: float | None = key(None, "fraction for validation; None: 0.01, of a single text 0.1", gt=0, lt=1)
    shard_tokens: int = key(100_000_000, "tokens in a file", ge=1)

    tokenizer: str = key(
        "gpt2",
        "char, byte, bpe:8192 (trained on the text), an encoding of tiktoken's, a tokenizer.json or .gguf, a hub id",
        group="Tokenizer",
    )
    pattern: Literal["gpt2", "words"] = key("gpt2", "how bpe:... splits text into words")
    train_mb: float = key(100.0, "MB of text that bpe:... is trained on", gt=0)

    workers: int = key(available_cores(), "processes; one for each core", group="Machine", ge=1, le=1024)


def main() -> None:
    config, _ = parse(PrepareConfig, description="Turn any text into a dataset.", positional="input")
    if not config.input or not config.out:
        raise InputError("give texts and where to write: prepare.py my.txt --out=FOLDER")
    try:
        "".encode(config.encoding)
    except (LookupError, ValueError) as error:
        raise InputError(f"--encoding={config.encoding}: unknown; use utf-8, latin-1, cp1252, utf-16 …") from error

    out = Path(config.out)
    tokenizer: str | Tokenizer = config.tokenizer
    if not is_learned(config.tokenizer):
        from nanogpt.interop.huggingface import find_tokenizer

        tokenizer = find_tokenizer(config.tokenizer)
    omissions = Omissions()
    separator = config.document_separator.replace("\\n", "\n")
    meta = prepare(
        out,
        find_inputs(config.input, omissions, find_earlier(out), config.skip_bad),
        tokenizer,
        options=ReadOptions(config.text_key, config.encoding, config.skip_bad, config.chat, separator),
        val_share=config.val_share,
        shard_tokens=config.shard_tokens,
        workers=config.workers,
        limit=config.docs,
        train_mb=config.train_mb,
        pattern=config.pattern,
        omissions=omissions,
    )
    print(f"{out}\n{format_summary(meta)}")


if __name__ == "__main__":
    run_script(main)
