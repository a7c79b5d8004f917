"""Cases of runs."""

from cases.command import Case

CASES: dict[str, Case] = {}
