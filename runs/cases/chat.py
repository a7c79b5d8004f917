"""Cases of chat."""

from cases.command import Case

CASES: dict[str, Case] = {}
