"""The documentation inside of Python itself, one token a character: python data/pydocs_char/prepare.py [--out=FOLDER]

In the tokens of another model: --tokenizer=model.gguf --out=data/pydocs_smollm2

A text of Tiny Shakespeare's size that needs no network: the language reference that `help()` shows, then the docstrings
of the standard library. It is the same on all machines with the same version of Python.
"""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from configurator import key, parse
from nanogpt.data.write import format_summary, write_text
from nanogpt.errors import run_script
from nanogpt.interop.huggingface import find_tokenizer
from nanogpt.text.tokenizer import Tokenizer

CHARACTERS = 1_115_394  # Tiny Shakespeare's
ASCII_TYPOGRAPHY = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "—": "--", "–": "-", "\t": "    "}
)
# Tests, and packages that some systems leave out of their Python.
EXCLUDED = {"test", "tests", "idle_test", "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}


def documents() -> Iterator[str]:
    """The topics by name, then the docstrings of each module by path, which is parsed but not imported."""
    for name in sorted(topics):
        yield topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or EXCLUDED.intersection(parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


@dataclass
class PyDocsConfig:
    """Folder to write to, and the tokens."""

    out: str = key(str(Path(__file__).parent), "folder to write to")
    tokenizer: str = key("", "an encoding of tiktoken's, a tokenizer.json or .gguf, a hub id; default: characters")


def main() -> None:
    config, _ = parse(PyDocsConfig, description="Prepare Python's own documentation, one token a character.")
    text = ""
    seen = set()
    for document in documents():
        document = document.translate(ASCII_TYPOGRAPHY).strip() + "\n\n"
        # The rest of Unicode would add rare characters to the vocabulary.
        if document.isascii() and document.replace("\n", "x").isprintable() and document not in seen:
            seen.add(document)
            text += document
        if len(text) >= CHARACTERS:
            break
    text = text[:CHARACTERS]
    print(f"{config.out}: {len(text):,} characters of Python {sys.version.split()[0]}")
    tokenizer = find_tokenizer(config.tokenizer) if config.tokenizer else Tokenizer.characters(text)
    print(format_summary(write_text(config.out, text, tokenizer)))


if __name__ == "__main__":
    run_script(main)
