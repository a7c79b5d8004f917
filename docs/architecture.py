"""The picture in architecture.md, drawn from the imports: python docs/architecture.py writes it anew."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"


def imports() -> dict[str, set[str]]:
    """Which modules of ours each of ours imports: "train" -> {"model", "nanogpt.data", …}. What is imported
    inside a function, or for type checkers alone, is left out."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    files |= {f"nanogpt.{path.stem}": path for path in ROOT.glob("nanogpt/*.py") if path.stem != "__init__"}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found[name] |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] &= files.keys() - {name}
    return found


def reach(arrows: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` needs, directly or not."""
    seen: set[str] = set()
    left = [*arrows[start]]
    while left:
        if (name := left.pop()) not in seen:
            seen.add(name)
            left += arrows[name]
    return seen


def picture() -> str:
    """Mermaid's text. An arrow that only repeats a longer way is not drawn."""
    arrows = imports()
    rooms = {"root": [n for n in arrows if "." not in n], "nanogpt": [n for n in arrows if "." in n]}
    lines = ["flowchart TD"]
    for room, names in rooms.items():
        lines.append(f"  subgraph {room}")
        lines += [f'    {name.replace(".", "_")}["{name.rpartition(".")[2]}.py"]' for name in sorted(names)]
        lines.append("  end")
    for name in sorted(arrows):
        farther = set().union(*(reach(arrows, other) for other in arrows[name]))
        lines += [f"  {name} --> {other}".replace(".", "_") for other in sorted(arrows[name] - farther)]
    return "\n".join(lines)


def page() -> str:
    """The page with the picture as it is now."""
    before, fence, rest = PAGE.read_text(encoding="utf-8").partition("```mermaid\n")
    return before + fence + picture() + "\n```" + rest.partition("```")[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
