"""nanogpt/schema.py: what an annotation accepts, what it converts, and how problems are named."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Never, NotRequired, TypedDict

import pytest

from nanogpt.errors import InputError
from nanogpt.schema import Count, Limits, build, check, key, matches


class Inner(TypedDict):
    size: Count
    name: NotRequired[str | None]


class Outer(TypedDict):
    inner: dict[str, Inner]
    state: dict[str, Never] | Inner
    values: list[float | None]


@pytest.mark.parametrize(
    ("annotation", "accepted", "refused"),
    [
        (int, [0, -5, 2**63 - 1, 5e3], [True, 2**63, 1.5, 1e300, "1", None, [1]]),
        (float, [1, -0.5, 1e308], [float("nan"), float("inf"), 10**400, True, "1"]),
        (bool, [True, False], [0, 1, "True", None]),
        (str, ["", "é"], ["nul\0", "half \ud800", 1, b"x"]),
        (Literal["auto", True], ["auto", True], [1, "True", False]),
        (int | None, [3, None], ["3", {}]),
        (Any, [3, "x", {}], []),
        (list[int], [[], [1, 2]], [[1, "2"], {}, (1,)]),
        (dict[str, Never], [{}], [{"a": 1}, []]),
        (Annotated[float | None, Limits(gt=0, lt=1)], [0.5, None], [0, 1, -1]),
        (Annotated[int, Limits(ge=1, le=3)], [1, 3], [0, 4]),
    ],
)
def test_check_accepts_what_the_annotation_allows(annotation: Any, accepted: list[Any], refused: list[Any]):
    assert [value for value in accepted if not matches(value, annotation)] == []
    assert [value for value in refused if matches(value, annotation)] == []


def test_check_converts_numbers_alone():
    for value, annotation, expected in ((5e3, int, 5000), (1, float | None, 1.0), (1, int | Literal["auto"], 1)):
        converted, problems = check(value, annotation)
        assert (converted, type(converted), problems) == (expected, type(expected), [])


def test_check_names_each_problem_by_its_place():
    value = {"inner": {"a": {"size": -1}, "b": {"name": 7}, "more": {"size": 1, "new": 1}}, "state": {"name": None}}
    assert check(value, Outer)[1] == [
        "inner.a.size: must be at least 0, is -1",
        "inner.b.size: is missing",
        "inner.b.name: expected text or None, got 7",
        "state.size: is missing",
        "values: is missing",
    ]
    assert check({"inner": [], "state": 1, "values": [0.5, "x"]}, Outer)[1] == [
        "inner: expected an object, got []",
        "state: expected an object, got 1",
        "values.1: expected a finite number or None, got 'x'",
    ]
    (line,) = check([[1] * 1000], int)[1]
    assert len(line) < 120
    assert "a strange int" in check(10**5000, int)[1][0]


@dataclass
class Settings:
    max_iters: int = key(1, "updates")
    dropout: float = key(0.0, "share", ge=0, lt=1)
    names: list[str] = key([], "words")


def test_build_reports_every_problem_with_its_source():
    built = build(Settings, {"dropout": 0, "max_iters": 5.0, "names": ["a"]}, "state.json")
    assert built == Settings(5, 0.0, ["a"])
    assert Settings().names is not Settings().names
    with pytest.raises(InputError) as caught:
        build(Settings, {"dropout": 1, "max_iters": "1", "drop": 0.1, "zzz": 1}, "state.json")
    assert str(caught.value).splitlines() == [
        "state.json: dropout: must be below 1, is 1.0",
        "state.json: max_iters: expected a whole number, got '1'",
        "state.json: drop: no such key; did you mean dropout?",
        "state.json: zzz: no such key; use max_iters, dropout, names",
    ]
