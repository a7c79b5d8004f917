"""Draw the picture in docs/architecture.md from the imports: python docs/architecture.py

Nodes are the files of the root and of the package, grouped by layer, and the data scripts as one. An arrow is an
import, dashed if it happens inside a function or for type checkers. Only arrows that do not follow from others are
drawn (the transitive reduction).
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "```mermaid\n"
END = "```\n"
Graph = dict[str, dict[str, bool]]  # file -> the files it imports, and whether at its top

# From the top down. A file imports only files of its own layer and of those below; a directory means all files in it.
LAYERS: dict[str, list[str]] = {
    "scripts": [
        *("train.py", "sample.py", "evaluate.py", "export.py", "bench.py", "compare.py", "play.py"),
        "data/",
    ],
    "load": ["load.py", "budget.py"],
    "model": ["model.py", "configurator.py"],
    "run": [
        *("state.py", "checkpoint.py", "train_log.py", "evaluation.py", "optim.py", "guard.py", "look_back.py"),
        *("layer_stats.py", "lora.py", "timing.py", "pace.py", "generate/", "interop/", "playground/"),
    ],
    "data": ["data/", "text/", "metrics.py", "memory.py"],
    "machine": [
        *("import_torch.py", "distributed.py", "rendezvous.py", "sharding.py", "trials.py", "device.py", "compile.py"),
        "cpu_kernels.py",
    ],
    "ground": [
        *(
            "errors.py",
            "files.py",
            "run_dir.py",
            "console.py",
            "hashing.py",
            "schema.py",
            "control.py",
            "schedule.py",
            "scaling.py",
        ),
        "interop/safe_pickle.py",
    ],
}
ROOT_LAYERS = ("scripts", "load", "model")
COLORS = {
    "scripts": "#fde68a",
    "load": "#fef3c7",
    "model": "#fef9c3",
    "run": "#dbeafe",
    "data": "#dcfce7",
    "machine": "#f3e8ff",
    "ground": "#f3f4f6",
}
OMITTED = ("nanogpt/errors.py",)  # from the picture: almost all files import it


def list_nodes() -> dict[str, list[Path]]:
    """The files of each node, by its name."""
    package = [path for path in (ROOT / "nanogpt").rglob("*.py") if path.name != "__init__.py"]
    nodes = {path.relative_to(ROOT).as_posix(): [path] for path in sorted([*ROOT.glob("*.py"), *package])}
    nodes["data/"] = sorted((ROOT / "data").rglob("*.py"))
    return nodes


def imported_names(node: ast.AST) -> list[str]:
    """Full names that an import statement may mean: of `from a import b`, both a.b and a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return []


def read_imports() -> Graph:
    nodes = list_nodes()
    graph: Graph = {node: {} for node in nodes}
    for node, paths in nodes.items():
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for statement in ast.walk(tree):
                for name in imported_names(statement):
                    target = name.replace(".", "/") + ".py"
                    if target in nodes and target != node:
                        at_top = statement in tree.body
                        graph[node][target] = graph[node].get(target, False) or at_top
    return graph


def layer_of(node: str) -> str:
    """The layer of a node; the longest entry that matches counts. Raises KeyError for a file without a layer."""
    matches = []
    for layer, entries in LAYERS.items():
        for entry in entries:
            path = entry if layer in ROOT_LAYERS else f"nanogpt/{entry}"
            if node == path or (entry.endswith("/") and node.startswith(path)):
                matches.append((len(path), layer))
    if not matches:
        raise KeyError(f"{node} has no layer in docs/architecture.py")
    return max(matches)[1]


def reachable(graph: Graph, start: str) -> set[str]:
    return {start}.union(*(reachable(graph, node) for node in graph[start]))


def is_implied(graph: Graph, node: str, target: str) -> bool:
    """True if other arrows lead from node to target; for an import at the top, other imports at the top."""
    at_top = graph[node][target]
    relevant = {a: {b: top for b, top in targets.items() if top or not at_top} for a, targets in graph.items()}
    return any(target in reachable(relevant, other) for other in relevant[node].keys() - {target})


def draw(graph: Graph) -> str:
    """The graph as mermaid text. Raises graphlib.CycleError for a cycle."""
    TopologicalSorter(graph).prepare()
    shown = sorted(node for node in graph if node not in OMITTED)
    lines = ["flowchart TD"]
    for layer, color in COLORS.items():
        members = [node for node in shown if layer_of(node) == layer]
        lines.append(f"  subgraph {layer}_layer [{layer}]")
        lines += [f'    {identifier(node)}["{node.removeprefix("nanogpt/")}"]' for node in members]
        lines.append("  end")
        lines.append(f"  style {layer}_layer fill:{color},stroke:#9ca3af,color:#111")
    for node in shown:
        for target, at_top in sorted(graph[node].items()):
            if target not in OMITTED and not is_implied(graph, node, target):
                lines.append(f"  {identifier(node)} {'-->' if at_top else '-.->'} {identifier(target)}")
    return "\n".join(lines) + "\n"


def identifier(node: str) -> str:
    return node.removesuffix(".py").replace("/", "_").strip("_") + "_"  # `end` and others are reserved in mermaid


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + draw(read_imports()) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
