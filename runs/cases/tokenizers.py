"""Cases of tokenizers."""

from cases.command import Case

CASES: dict[str, Case] = {}
