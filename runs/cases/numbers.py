"""Cases of numbers."""

from cases.command import Case

CASES: dict[str, Case] = {}
