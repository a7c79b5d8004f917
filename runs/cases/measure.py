"""Try each case that went wrong in version 0.1 on two checkouts: python runs/cases/measure.py --old=CHECKOUT

A case does by command line what a user did, and looks at what came of it. The table says for each, before and after,
whether that was right and what was seen. `--only=T,R4` takes the cases whose names begin so.
"""

import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "runs")]  # not this folder, whose numbers.py would hide Python's

from cases.command import Case  # noqa: E402
from configurator import key, parse  # noqa: E402
from nanogpt.errors import InputError, run_script  # noqa: E402

MODULES = ("text", "tokenizers", "token_files", "chat", "weights", "runs", "numbers")


@dataclass
class CasesConfig:
    """Which cases to try, and where."""

    old: str = key("", "checkout of version 0.1; '' tries this one alone")
    only: str = key("", "cases whose names begin with one of these, separated by commas")
    to: str = key("runs/cases/results.json", "file of the results; the table goes beside it, as .md")


def find_cases(prefixes: tuple[str, ...]) -> dict[str, Case]:
    """All cases by name, in the order of the modules."""
    cases: dict[str, Case] = {}
    for module in MODULES:
        cases |= importlib.import_module(f"cases.{module}").CASES
    return {name: case for name, case in cases.items() if name.startswith(prefixes)}


def try_case(case: Case, checkout: Path) -> dict[str, object]:
    """What came of a case in a checkout; a case that raises counts as wrong."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            is_right, seen = case.run(checkout, Path(folder))
        except subprocess.TimeoutExpired as error:
            is_right, seen = False, f"no end after {error.timeout:.0f} s"
        except Exception as error:  # the old build ends in whatever way
            is_right, seen = False, f"{type(error).__name__}: {error}"
    seen = " ".join(seen.replace(folder, "…").split())
    return {"right": is_right, "seen": seen[:200]}


def main() -> None:
    config, _ = parse(CasesConfig, description="Try the cases on two checkouts.")
    cases = find_cases(tuple(config.only.split(",")))
    if not cases:
        raise InputError(f"--only={config.only}: there is no such case")
    checkouts = {"after": ROOT}
    if config.old:
        checkouts = {"before": Path(config.old).resolve(), **checkouts}

    results = {}
    for name, case in cases.items():
        results[name] = {"deed": case.deed, **{side: try_case(case, path) for side, path in checkouts.items()}}
        print(name, *(f"{side}: {'right' if results[name][side]['right'] else 'WRONG'}" for side in checkouts))
    Path(config.to).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Path(config.to).with_suffix(".md").write_text(format_table(results, list(checkouts)), encoding="utf-8")


def format_table(results: dict, sides: list[str]) -> str:
    lines = ["| case | deed | " + " | ".join(sides) + " |", "|---" * (2 + len(sides)) + "|"]
    for name, result in results.items():
        seen = [("" if result[side]["right"] else "**wrong**: ") + str(result[side]["seen"]) for side in sides]
        cells = [name, result["deed"], *seen]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
