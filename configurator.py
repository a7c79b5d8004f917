"""Settings of a script: a dataclass of keys, then config files, then --key=value flags; the later wins.

@dataclass
class SampleConfig:
    seed: int = key(1337, "seed of every random choice", group="Randomness", ge=0)

config, explicit = parse(SampleConfig)
"""

import argparse
import ast
import builtins
import dataclasses
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from nanogpt.errors import raise_problems
from nanogpt.schema import Config, check_keys, key, options, type_hints

__all__ = ["Config", "ExplicitKeys", "key", "parse"]

CONSTANTS = {"None": None, "none": None, "True": True, "true": True, "False": False, "false": False}
METAVARS = {int: "int", float: "float", bool: "True|False", str: "text", NoneType: "None", list[str]: "text ..."}
Entry = tuple[str, str, Any]  # place to name in an error, key, value


class ExplicitKeys(dict[str, Any]):
    """The keys that config files and flags set, with their values; `flags` names those that flags set."""

    def __init__(self, values: dict[str, Any], flags: set[str]):
        super().__init__(values)
        self.flags = flags


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    description: str = "",
    positional: str | None = None,
) -> tuple[Config, ExplicitKeys]:
    """Return the validated config, and the keys that files and flags set.

    Words without `--` are config files or, if given, values of the key `positional`. A flag of a list[str] takes all
    words up to the next flag, and adds to those of the same flag before it. One of a bool without a value means True.
    Hyphens in names count as underscores, and `--key=~/path` begins with the home directory, as `--key ~/path` does.
    Raises InputError with a line for each problem.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        _build_help(config_class, description, positional).print_help()
        sys.exit(0)

    words, flags = _split(argv, type_hints(config_class))
    if words and positional:
        flags.insert(0, (positional, words))
    files = [] if positional else words
    defaults = vars(config_class())
    values: dict[str, Any] = {}
    problems: list[str] = []

    for file in files:
        entries, file_problems = _run_file(file, {**defaults, **values})
        file_values, key_problems = check_keys(config_class, entries, hint="a name that is not a key must begin with _")
        values |= file_values
        problems += file_problems + key_problems

    entries, flag_problems = _read_flags(flags, config_class)
    flag_values, key_problems = check_keys(config_class, entries, prefix="--")
    values |= flag_values
    problems += flag_problems + key_problems

    if not problems:
        missing = [name for name, default in defaults.items() if default is ... and name not in values]
        problems = [f"--{name} is missing: it has no default" for name in missing]
    raise_problems(problems)
    return config_class(**values), ExplicitKeys(values, set(flag_values))


# --- Flags


def _split(argv: Sequence[str], hints: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Words that belong to no flag, and flags with the words of their values, each in their order."""
    words: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    takes = 0  # values that the last flag still takes
    is_switch = False
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if value.startswith("~/"):
                value = os.path.expanduser(value)
            flags.append((name, [value] if equals else []))
            takes = 1
            if equals:
                takes = 0
            elif _is_list(hints.get(name)):
                takes = len(argv)  # all words up to the next flag
            is_switch = options(hints.get(name)) == [bool]  # --eval_only, which a config file may follow
        elif takes and not (is_switch and word not in CONSTANTS):
            flags[-1][1].append(word)
            takes -= 1
        else:
            words.append(word)
    return words, flags


def _is_list(annotation: Any) -> bool:
    return options(annotation) == [list[str]]


def _read_flags(flags: list[tuple[str, list[str]]], config_class: Any) -> tuple[list[Entry], list[str]]:
    hints = type_hints(config_class)
    defaults = vars(config_class())
    entries: list[Entry] = []
    problems: list[str] = []
    for name, texts in flags:
        if _is_list(hints.get(name)):
            texts = [text for other, words in flags if other == name for text in words]
        place = f"--{name}={' '.join(texts)}" if texts else f"--{name}"
        if name in hints and not texts and options(hints[name]) == [bool]:
            entries.append((place, name, True))
        elif name in hints and not texts:
            example = True if defaults[name] is False else defaults[name]
            has_example = example is not None and example not in (..., [], "")
            problems.append(f"{place}: needs a value" + (f", as in --{name}={example}" if has_example else ""))
        elif name in hints and len(texts) > 1 and not _is_list(hints[name]):
            problems.append(f"{place}: takes one value, got {len(texts)}")
        elif name in hints:
            entries.append((place, name, texts if _is_list(hints[name]) else _parse_text(texts[0], hints[name])))
        else:
            entries.append((place, name, None))
    return entries, problems


def _parse_text(text: str, annotation: Any) -> Any:
    """The value that a flag's text stands for; the text itself where the annotation allows nothing like it."""
    allowed = options(annotation)
    if text in allowed:
        return text
    constant = CONSTANTS.get(text, text)
    if constant is not text and (type(constant) in allowed or any(constant is option for option in allowed)):
        return constant
    if str not in allowed and (int in allowed or float in allowed):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
    return text


# --- Config files


def _run_file(file: str, current: dict[str, Any]) -> tuple[list[Entry], list[str]]:
    """Execute a config file: the keys it sets, and the problems of the file itself."""
    if os.path.isfile(file) and not file.endswith(".py"):
        return [], [f"{file}: is not a config file, which ends in .py; give values with --key=value"]
    try:
        source = Path(file).read_bytes()
        tree = ast.parse(source, filename=file)
        code = compile(tree, file, "exec")
    except OSError as error:
        return [], [f"{file}: {_explain_unreadable(file, error)}"]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        return [], [f"{file}:{getattr(error, 'lineno', None) or 1}: not valid Python: {getattr(error, 'msg', error)}"]

    # The keys' values are builtins: the file can read them, and its own names are exactly those that it set.
    names: dict[str, Any] = {"__builtins__": vars(builtins) | current, "__file__": file, "__name__": "config"}
    problems = []
    try:
        exec(code, names)
    except Exception as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        problems.append(f"{file}:{at[-1] if at else 1}: {type(error).__name__}: {' '.join(str(error).split())}")

    stores = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    lines = {node.id: node.lineno for node in stores}
    # Imported modules and functions do not count as keys.
    is_set = [name for name in names if name in current or (name in lines and not name.startswith("_"))]
    ordered = sorted((lines.get(name, 1), name) for name in is_set)
    return [(f"{file}:{line}: {name}", name, names.get(name)) for line, name in ordered], problems


def _explain_unreadable(file: str, error: OSError) -> str:
    if "=" in file or file.startswith("-"):
        return f"no such file; did you mean the flag --{file.lstrip('-')}?"
    if os.path.isdir(file):
        return f"is a folder; give values as --key=value, such as --out_dir={file}"
    folders = [folder for folder in (Path(file).parent, Path(__file__).parent / "config") if os.path.isdir(folder)]
    by_stem = {path.stem: os.path.relpath(path) for folder in folders for path in folder.glob("*.py")}
    close = difflib.get_close_matches(Path(file).stem, by_stem, n=1)
    reason = (error.strerror or "cannot be read").lower()
    return f"{reason}; did you mean {by_stem[close[0]]}?" if close else reason


# --- Help


def _build_help(config_class: Any, description: str, positional: str | None) -> argparse.ArgumentParser:
    hints = type_hints(config_class)
    defaults = vars(config_class())
    if not positional:
        description += " Keys are set by the files, then by the flags; later ones win."
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s [{positional or 'FILE.py'} ...] [--key=value ...]",
        description=description.strip(),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        allow_abbrev=False,
    )
    group: argparse._ArgumentGroup = parser.add_argument_group("keys")
    for field in dataclasses.fields(config_class):
        if field.metadata.get("group"):
            group = parser.add_argument_group(field.metadata["group"])
        default = defaults[field.name]
        note = "required" if default is ... else f"default: {default if str(default).strip() else repr(default)}"
        metavar = "|".join(METAVARS.get(option, str(option)) for option in options(hints[field.name]))
        group.add_argument(
            f"--{field.name}", metavar=metavar, help=f"{field.metadata['help']} ({note})".replace("%", "%%")
        )
    return parser
