"""Draw the picture in docs/architecture.md from the imports: python docs/architecture.py

Nodes are the root's files, the toolbox's, and the data scripts as one. An arrow is an import, dashed where it waits for
a call or serves types alone. Only the arrows from which all others follow are drawn (the transitive reduction), a solid
one from solid ones: what is imported at the top stays told as such.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "```mermaid\n", "```\n"
YELLOW, BLUE = "fill:#fef3c7,stroke:#d97706,color:#111", "fill:#dbeafe,stroke:#60a5fa,color:#111"
Graph = dict[str, dict[str, bool]]  # file -> the files it imports, and whether at its top, whenever it is read


def files() -> dict[str, list[Path]]:
    """Each node's files. `nanogpt/__init__.py`, the errors, is left out: all import it, and it imports nobody."""
    toolbox = [path for path in (ROOT / "nanogpt").glob("*.py") if path.name != "__init__.py"]
    nodes = {str(path.relative_to(ROOT)): [path] for path in sorted([*ROOT.glob("*.py"), *toolbox])}
    return nodes | {"data/": sorted((ROOT / "data").rglob("*.py"))}


def imported(node: ast.AST) -> list[str]:
    """Full names that an import statement may mean: of `from a import b`, both a.b and a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports here are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return []


def read() -> Graph:
    """Who imports whom."""
    nodes = files()
    graph: Graph = {node: {} for node in nodes}
    for node, paths in nodes.items():
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for statement in ast.walk(tree):
                for name in imported(statement):
                    target = name.replace(".", "/") + ".py"
                    if target in nodes:
                        graph[node][target] = graph[node].get(target, False) or statement in tree.body
    return graph


def reached(graph: Graph, first: str) -> set[str]:
    """All that `first` leads to, itself included."""
    return {first}.union(*(reached(graph, node) for node in graph[first]))


def follows(graph: Graph, node: str, target: str) -> bool:
    """Whether the arrow from node to target follows from others: for an import at the top, from such imports alone."""
    at_top = graph[node][target]
    seen = {a: {b: top for b, top in targets.items() if top or not at_top} for a, targets in graph.items()}
    return any(target in reached(seen, other) for other in seen[node].keys() - {target})


def draw(graph: Graph) -> str:
    """Mermaid's text for a graph without circles; graphlib.CycleError for one with them."""
    TopologicalSorter(graph).prepare()
    toolbox = ",".join(key(node) for node in sorted(graph) if node.startswith("nanogpt/"))
    lines = ["flowchart TD", *(f'  {key(node)}["{label(node)}"]' for node in sorted(graph))]
    for node in sorted(graph):
        for target, at_top in sorted(graph[node].items()):
            if not follows(graph, node, target):
                lines.append(f"  {key(node)} {'-->' if at_top else '-.->'} {key(target)}")
    lines += [f"  class {toolbox} toolbox", f"  classDef toolbox {BLUE}", f"  classDef default {YELLOW}"]
    return "\n".join(lines) + "\n"


def key(node: str) -> str:
    return node.removesuffix(".py").replace("/", "_").strip("_") + "_"  # `end` and such are mermaid's own words


def label(node: str) -> str:
    return "data/**/*.py" if node == "data/" else node.removeprefix("nanogpt/")


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + draw(read()) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
