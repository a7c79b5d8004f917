"""The documentation inside of Python itself, one token a character: python data/pydocs_char/prepare.py [--out=FOLDER]

A text of Tiny Shakespeare's size that needs no network: the language reference that `help()` shows, then the docstrings
of the standard library. It is the same wherever the Python version is, but not from one version to the next.
"""

import argparse
import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from nanogpt.data.write import format_summary, write_text
from nanogpt.errors import run_script
from nanogpt.text.tokenizer import Tokenizer

CHARACTERS = 1_115_394  # Tiny Shakespeare's
TYPEWRITTEN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "—": "--", "–": "-", "\t": "    "})
# Tests, and what some systems leave out of their Python.
LEFT_OUT = {"test", "tests", "idle_test", "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}


def documents() -> Iterator[str]:
    """The topics by name, then the docstrings of each module by path; sources are parsed, never imported."""
    for name in sorted(topics):
        yield topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or LEFT_OUT.intersection(parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare Python's own documentation, one token a character.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this script)")
    args = parser.parse_args()
    text, seen = "", set()
    for document in documents():
        document = document.translate(TYPEWRITTEN).strip() + "\n\n"
        # What is not ASCII even so would put rare characters into the vocabulary.
        if document.isascii() and document.replace("\n", "x").isprintable() and document not in seen:
            seen.add(document)
            text += document
        if len(text) >= CHARACTERS:
            break
    text = text[:CHARACTERS]
    print(f"{args.out}: {len(text):,} characters of Python {sys.version.split()[0]}")
    print(format_summary(write_text(args.out, text, Tokenizer.characters(text))))


if __name__ == "__main__":
    run_script(main)
