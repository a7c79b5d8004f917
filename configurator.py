"""Settings of a script: a dataclass of keys, then config files, then --key=value flags; the later wins.

@dataclass
class SampleConfig:
    seed: int = key(1337, "seed of every random choice", group="Randomness", ge=0)

config, given = parse(SampleConfig)
"""

import argparse
import ast
import builtins
import dataclasses
import difflib
import math
import operator
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nanogpt.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
LIMITS = {  # name in key(): (what it demands, the test)
    "ge": ("at least", operator.ge),
    "le": ("at most", operator.le),
    "gt": ("above", operator.gt),
    "lt": ("below", operator.lt),
}
WORDS = {"None": None, "none": None, "True": True, "true": True, "False": False, "false": False}
EXPECTED = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", NoneType: "None"}
UNNAMEABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # what no file's name can hold: NUL, broken Unicode
INNER_SCOPES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
METAVARS = {int: "int", float: "float", bool: "True|False", str: "text", NoneType: "None"}


def key(
    default: Any,
    help: str,
    *,
    group: str | None = None,  # heading in --help; keys without one belong to the group of the key before
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with its line of help and the limits of its values."""
    limits = {"ge": ge, "le": le, "gt": gt, "lt": lt}
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **limits})


def parse(
    config_class: type[Config], argv: Sequence[str] | None = None, description: str = ""
) -> tuple[Config, dict[str, Any]]:
    """The validated config, and the keys that files and flags have set. InputError names every problem at once."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        _help(config_class, description).print_help()
        sys.exit(0)
    given: dict[str, Any] = {}
    problems: list[str] = []
    files, flags = _split(argv)
    for file in files:
        current = {f.name: f.default for f in dataclasses.fields(config_class)} | given
        entries, faults = _run_file(file, current)
        values, more = _validate(config_class, entries)
        given |= values
        problems += faults + more
    values, more = _validate(config_class, flags, from_flags=True)
    given |= values
    return _finish(config_class, given, problems + more), given


def build(config_class: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """A config from settings read elsewhere, such as a checkpoint's; `source` begins each line of the InputError."""
    checked, problems = _validate(config_class, [(f"{source}: {name}", name, value) for name, value in values.items()])
    return _finish(config_class, checked, problems)


def _finish(config_class: type[Config], values: dict[str, Any], problems: list[str]) -> Config:
    if problems:
        raise InputError("\n".join(problems))
    return config_class(**values)


# Files and flags become entries: (place to name in an error, key, value).
Entry = tuple[str, str, Any]


def _split(argv: list[str]) -> tuple[list[str], list[Entry]]:
    """Config files and flags, each in their order; a flag without a value has the value None."""
    files, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        flags.append((f"--{name}{equals}{value}", name, value if equals else None))
    return files, flags


def _run_file(file: str, current: dict[str, Any]) -> tuple[list[Entry], list[str]]:
    """What a config file sets, and what is wrong with the file itself."""
    try:
        tree = ast.parse(Path(file).read_bytes(), filename=file)
        lines = {name: line for name, line in _assigned(tree) if not name.startswith("_")}
    except OSError as error:
        return [], [f"{file}: {_why_unreadable(file, error)}"]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        return [], [f"{file}:{getattr(error, 'lineno', None) or 1}: not valid Python: {getattr(error, 'msg', error)}"]
    # The keys' values stand among the builtins: the file can read them, and its own names are exactly what it set.
    names: dict[str, Any] = {"__builtins__": vars(builtins) | current, "__file__": file, "__name__": "config"}
    faults = []
    try:
        exec(compile(tree, file, "exec"), names)
    except Exception as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        faults = [f"{file}:{at[-1] if at else 1}: {type(error).__name__}: {' '.join(str(error).split())}"]
    found = {name for name in lines if name not in current} | {name for name in names if name in current}
    ordered = sorted((lines.get(name, 1), name) for name in found)
    return [(f"{file}:{line}: {name}", name, names.get(name)) for line, name in ordered], faults


def _assigned(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a module assigns at its own level, `if` and `for` included, and their lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, child.lineno
        elif not isinstance(child, INNER_SCOPES):
            yield from _assigned(child)


def _why_unreadable(file: str, error: OSError) -> str:
    if "=" in file or file.startswith("-"):
        return f"no such file; did you mean the flag --{file.lstrip('-')}?"
    homes = [home for home in (Path(file).parent, Path(__file__).parent / "config") if os.path.isdir(home)]
    recipes = [recipe for home in homes for recipe in home.glob("*.py")]
    by_stem = {path.stem: os.path.relpath(path) for path in recipes}
    close = difflib.get_close_matches(Path(file).stem, by_stem, n=1)
    return f"{(error.strerror or 'cannot be read').lower()}{f'; did you mean {by_stem[close[0]]}?' if close else ''}"


def _validate(
    config_class: Any, entries: Iterable[Entry], from_flags: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The one validator: values that are right, in their key's type, and a line for each one that is wrong."""
    keys, hints = {f.name: f for f in dataclasses.fields(config_class)}, get_type_hints(config_class)
    values: dict[str, Any] = {}
    problems = []
    for place, name, value in entries:
        try:
            if name not in keys:
                raise ValueError(_no_such_key(name, list(keys), from_flags))
            if from_flags and value is None:
                raise ValueError(f"needs a value, as in --{name}={keys[name].default}")
            value = _convert(hints[name], value, is_text=from_flags)
            for limit, (demand, holds) in LIMITS.items():
                bound = keys[name].metadata.get(limit)
                if bound is not None and type(value) in (int, float) and not holds(value, bound):
                    raise ValueError(f"must be {demand} {bound}" + ("" if from_flags else f", is {value}"))
            values[name] = value
        except ValueError as error:
            problems.append(f"{place}: {error}")
    return values, problems


def _no_such_key(name: str, keys: list[str], from_flags: bool) -> str:
    close = difflib.get_close_matches(name.replace("-", "_").lower(), keys, n=1)
    if close:
        return f"no such key; did you mean {'--' * from_flags}{close[0]}?"
    return "no such key; " + ("--help lists them" if from_flags else "a name that is not a key must begin with _")


def _convert(hint: Any, value: Any, is_text: bool) -> Any:
    """The value as its annotation wants it: text from a flag is read, 5e3 is a whole number, 1 is a float."""
    options, got = _options(hint), value
    if is_text and value not in options:
        value = WORDS.get(value, value)
        if str in options and not (value is None and NoneType in options):
            value = got
        else:
            value = _number(value) if isinstance(value, str) else value
    if type(value) is int and int not in options and float in options:
        value = _number(f"{value}.0")
    elif type(value) is float and float not in options and value.is_integer():
        value = int(value)
    fits = any(type(value) is option or (type(value) is type(option) and value == option) for option in options)
    beyond = (isinstance(value, float) and not math.isfinite(value)) or (type(value) is int and abs(value) >= 2**63)
    if not fits or beyond or (isinstance(value, str) and UNNAMEABLE.search(value)):
        raise ValueError(f"expected {' or '.join(EXPECTED.get(o, str(o)) for o in options)}, got {got!r}")
    return value


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _options(hint: Any) -> list[Any]:
    """The types and the literal values that an annotation allows."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [option for part in get_args(hint) for option in _options(part)] or [hint]


def _help(config_class: Any, description: str) -> argparse.ArgumentParser:
    first, hints = dataclasses.fields(config_class)[0], get_type_hints(config_class)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FILE.py ...] [--key=value ...]",
        description=f"{description} Settings come from the files, then from the flags; the later wins.".strip(),
        epilog=f"example: python {Path(sys.argv[0]).name} config/my_recipe.py --{first.name}={first.default}",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        allow_abbrev=False,
    )
    group: argparse._ArgumentGroup = parser.add_argument_group("keys")
    for field in dataclasses.fields(config_class):
        if field.metadata.get("group"):
            group = parser.add_argument_group(field.metadata["group"])
        text = f"{field.metadata.get('help', '')} (default: {field.default if field.default != '' else repr('')})"
        metavar = "|".join(METAVARS.get(option, str(option)) for option in _options(hints[field.name]))
        group.add_argument(f"--{field.name}", metavar=metavar, help=text.replace("%", "%%"))
    return parser
