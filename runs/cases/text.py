"""Cases of text."""

from cases.command import Case

CASES: dict[str, Case] = {}
