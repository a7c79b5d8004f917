"""The language of the project (docs/decisions.md, "Language"): words that hide a standard term are banned."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

BANNED = {
    r"told|tells?|telling": "print, say, return …",
    r"fellows?": "processes, ranks",
    r"in vain": "timed out",
    r"rivals?": "alternatives, top-k",
    r"by heart": "overfit",
    r"go(es|ing)? on|went on": "resume, continue",
    r"so many": "this many, N",
    r"comes and goes": "temporaries",
    r"the house|rooms?": "modules",
    r"the dial": "time budget",
    r"luck": "run-to-run variance",
    r"odds": "probabilities",
    r"remedy|remedies": "hint, fix",
    r"mend(s|ed|ing)?": "fix",
    r"for ever": "permanently",
}
PATTERN = re.compile(r"(?<![\w.-])(" + "|".join(BANNED) + r")(?![\w-])", re.IGNORECASE)
BRITISH = re.compile(
    r"\b\w*((initial|normal|orthogonal|optim|token|serial|recogn|organ|quant|random|summar|minim|maxim|synchron)is(e|ing|ation)"
    r"|colour|behaviour|neighbour|favour|licence|centre\b|grey\b)\w*",
    re.IGNORECASE,
)
CODE = sorted([*ROOT.glob("*.py"), *(ROOT / "nanogpt").rglob("*.py"), *(ROOT / "data").rglob("*.py")])
PAGES = [ROOT / "README.md", ROOT / "INDEX.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=name)
def test_words_are_the_fields(path: Path):
    text = path.read_text(encoding="utf-8")
    found = [f"{match[0]!r} in line {text.count(chr(10), 0, match.start()) + 1}" for match in PATTERN.finditer(text)]
    found += [f"British {match[0]!r}" for match in BRITISH.finditer(text)]
    assert not found


def test_identifiers_are_no_past_participles():
    """Names are nouns or verbs: what was told, opened, held … has a better name."""
    participles = re.compile(r"(^|_)(told|opened|held|found|made|given|asked|kept|dealt|shown)$")
    found = []
    for path in CODE:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NAME and participles.search(token.string):
                found.append(f"{name(path)}:{token.start[0]} {token.string}")
    assert not found


@functools.cache
def syntax() -> list[tuple[str, ast.AST]]:
    """The nodes of all code, each with its file."""
    return [(name(path), node) for path in CODE for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def test_docstrings_begin_with_a_short_statement():
    documented = ast.FunctionDef | ast.ClassDef | ast.Module
    docs = [(file, ast.get_docstring(node) or "") for file, node in syntax() if isinstance(node, documented)]
    assert [(file, doc) for file, doc in docs if re.match(r"(What|How|Whether)\b", doc)] == []


def test_lines_hold_one_idea():
    """Fewer than 60 tuple assignments of unrelated values."""
    unrelated = []
    for file, node in syntax():
        match node:
            case ast.Assign(targets=[ast.Tuple(), *_], value=ast.Tuple()):
                unrelated.append(f"{file}:{node.lineno}")
    assert len(unrelated) < 60, unrelated
