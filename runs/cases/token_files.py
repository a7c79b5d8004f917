"""Cases of token_files."""

from cases.command import Case

CASES: dict[str, Case] = {}
