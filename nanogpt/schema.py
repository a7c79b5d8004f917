"""Check values against type annotations: JSON files, settings, flags. Every problem is reported at once.

    class Meta(TypedDict):
        vocab_size: Annotated[int, Limits(ge=1)]
        end_of_text: NotRequired[int | None]

    meta, problems = check(value, Meta)  # ["vocab_size: must be at least 1, is 0"]

An annotation is int, float, bool, str, None, Any, Never, a Literal, a union, list[...], dict[str, ...], a TypedDict, or
Annotated with Limits. Integers have 64 bits and floats are finite. 5e3 counts as an integer and 1 as a float; nothing
else is converted. Unknown keys are allowed in a TypedDict, but not in a dataclass (`check_keys`, `build`).
"""

import contextlib
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Never,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from nanogpt.errors import raise_problems, suggest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
EXPECTED = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    NoneType: "None",
    list: "a list",
    dict: "an object",
    Never: "nothing",
}
NOT_IN_FILE_NAMES = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # NUL, surrogates; not those of bytes


COMPARISONS = {  # name of a limit: its words and its test
    "ge": ("at least", operator.ge),
    "le": ("at most", operator.le),
    "gt": ("above", operator.gt),
    "lt": ("below", operator.lt),
}


class Limits:
    """Bounds of a number (ge, le, gt, lt), as an argument of Annotated; other values pass."""

    def __init__(self, **bounds: float):
        self.bounds = bounds

    def problem(self, value: Any) -> str | None:
        for name, bound in self.bounds.items():
            words, holds = COMPARISONS[name]
            if type(value) in (int, float) and not holds(value, bound):
                return f"must be {words} {bound:,}, is {value}"
        return None


Count = Annotated[int, Limits(ge=0)]
NonNegative = Annotated[float, Limits(ge=0)]


def key(default: Any, help: str, *, group: str | None = None, **limits: float) -> Any:
    """A dataclass field with its help line, and the limits (ge, le, gt, lt) of its numbers.

    default: `...` makes the key required. group: a heading in --help, for this key and those that follow.
    """
    metadata = {"help": help, "group": group, "limits": Limits(**limits)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(value: Any, annotation: Any, place: str = "") -> tuple[Any, list[str]]:
    """Return `value` in its annotated types, and a line `place: problem` for each problem in it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is NotRequired:
        return check(value, args[0], place)
    if origin is Annotated:
        converted, problems = check(value, args[0], place)
        problem = None if problems else args[1].problem(converted)
        return converted, [_line(place, problem)] if problem else problems
    if origin in (Union, UnionType):
        return _check_union(value, annotation, place)
    if is_typeddict(annotation) and isinstance(value, dict):
        return _check_items(value, type_hints(annotation), annotation.__required_keys__, place)
    if origin is dict and isinstance(value, dict):
        return _check_items(value, dict.fromkeys(value, args[1]), (), place)
    if origin is list and isinstance(value, list):
        items = dict(enumerate(value))
        converted, problems = _check_items(items, dict.fromkeys(items, args[0]), (), place)
        return list(converted.values()), problems
    return _check_scalar(value, annotation, place)


def matches(value: Any, annotation: Any) -> bool:
    return not check(value, annotation)[1]


def _check_union(value: Any, union: Any, place: str) -> tuple[Any, list[str]]:
    expected = _line(place, "expected ")
    problems = [f"{expected}{describe(union)}, got {_brief(value)}"]
    for option in get_args(union):
        converted, option_problems = check(value, option, place)
        if not option_problems:
            return converted, []
        if not option_problems[0].startswith(expected):  # the right kind of value, but something is wrong inside
            problems = option_problems
    return value, problems


def _check_items(
    items: dict[Any, Any], annotations: Mapping[Any, Any], required: Iterable[str], place: str
) -> tuple[dict[Any, Any], list[str]]:
    converted, problems = dict(items), []
    for name, annotation in annotations.items():
        item_place = f"{place}.{name}" if place else str(name)
        if name in items:
            converted[name], item_problems = check(items[name], annotation, item_place)
            problems += item_problems
        elif name in required:
            problems.append(f"{item_place}: is missing")
    return converted, problems


def _check_scalar(value: Any, annotation: Any, place: str) -> tuple[Any, list[str]]:
    converted = value
    with contextlib.suppress(OverflowError):
        if annotation is float and type(value) is int:
            converted = float(value)
        elif annotation is int and type(value) is float and value.is_integer():
            converted = int(value)
    if get_origin(annotation) is Literal:
        is_valid = any(type(value) is type(option) and value == option for option in get_args(annotation))
    elif type(converted) is not annotation:
        is_valid = annotation is Any
    elif annotation is float:
        is_valid = math.isfinite(converted)
    elif annotation is int:
        is_valid = abs(converted) < 2**63
    else:
        is_valid = annotation is not str or not NOT_IN_FILE_NAMES.search(converted)
    if is_valid:
        return converted, []
    return value, [_line(place, f"expected {describe(annotation)}, got {_brief(value)}")]


def check_keys(
    config_class: Any, entries: Iterable[tuple[str, str, Any]], prefix: str = "", hint: str = "--help lists them"
) -> tuple[dict[str, Any], list[str]]:
    """Check (place, key, value) entries against a dataclass of keys: the valid values, and a line for each problem.

    `prefix` and `hint` word the problem of a name that is not a key.
    """
    annotations = type_hints(config_class)
    values, problems = {}, []
    for place, name, value in entries:
        if name in annotations:
            converted, value_problems = check(value, annotations[name], place)
            problems += value_problems
            if not value_problems:
                values[name] = converted
        else:
            suggestion = suggest(name.replace("-", "_").lower(), annotations, hint, prefix)
            problems.append(f"{place}: no such key; {suggestion}")
    return values, problems


def build(config_class: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build a config from settings read from `source`, such as a checkpoint. Raises InputError for every problem."""
    entries = [(f"{source}: {name}", name, value) for name, value in values.items()]
    checked, problems = check_keys(config_class, entries, hint=f"use {', '.join(type_hints(config_class))}")
    raise_problems(problems)
    return config_class(**checked)


@functools.cache
def type_hints(schema: Any) -> dict[str, Any]:
    """The annotations of a TypedDict, or of a dataclass's fields with their limits."""
    hints = get_type_hints(schema, include_extras=True)
    if dataclasses.is_dataclass(schema):
        for field in dataclasses.fields(schema):
            hints[field.name] = Annotated[hints[field.name], field.metadata.get("limits", Limits())]
    return hints


def options(annotation: Any) -> list[Any]:
    """The types and literal values that an annotation allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return options(args[0])
    if origin is Literal:
        return list(args)
    if origin in (Union, UnionType):
        return [option for part in args for option in options(part)]
    return [dict if is_typeddict(annotation) else annotation]


def describe(annotation: Any) -> str:
    words = [EXPECTED.get(get_origin(option) or option, str(option)) for option in options(annotation)]
    return " or ".join(dict.fromkeys(words))


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4,300 digits, or an object that a config file made
        return f"a strange {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line(place: str, text: str) -> str:
    return f"{place}: {text}" if place else text
