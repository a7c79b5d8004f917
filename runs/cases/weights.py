"""Cases of weights."""

from cases.command import Case

CASES: dict[str, Case] = {}
