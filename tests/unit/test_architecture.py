"""Imports point one way, the picture of them is current, functions stay short."""

import ast
import graphlib
import re
import runpy
from types import SimpleNamespace

from conftest import ROOT

architecture = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "architecture.py")))
GRAPH = architecture.read_imports()
ORDER = list(architecture.LAYERS)
# What a newcomer reads in an evening (docs/architecture.md, "Reading order"): the network, the loop, sampling, and what
# they are made of. Machine, files, logging and budgets are wings.
CORE = [
    *("model.py", "train.py", "sample.py", "load.py"),
    *(f"nanogpt/{name}.py" for name in ("schedule", "optim", "guard", "state", "control", "distributed")),
    *(f"nanogpt/{name}.py" for name in ("data/rows", "evaluation", "generate/sampling", "generate/decoder")),
]


def test_picture_is_current():
    picture = architecture.BEGIN + architecture.draw(GRAPH) + architecture.END
    assert picture in architecture.PAGE.read_text(encoding="utf-8"), "run `python docs/architecture.py`"


def test_imports_have_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_imports_point_down():
    upward = []
    for node, targets in GRAPH.items():
        for target in targets:
            is_upward = ORDER.index(architecture.layer_of(target)) < ORDER.index(architecture.layer_of(node))
            # model.py must run when copied alone, so it imports the package only inside of functions.
            if is_upward or (node == "model.py" and targets[target]):
                upward.append((node, target))
    assert not upward


def test_scripts_import_no_script_but_train_step():
    scripts = {node for node in GRAPH if architecture.layer_of(node) == "scripts"}
    between = [(node, target) for node in scripts for target in GRAPH[node] if target in scripts]
    assert between == [("bench.py", "train.py")]


def test_core_is_read_in_an_evening():
    assert sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in CORE) <= 3000


def test_train_functions_are_short_and_the_step_comes_first():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert max(node.end_lineno - node.lineno + 1 for node in functions.values()) <= 90
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainConfig")
    assert next(iter(functions)) == "train_step"
    backward = next(number for number, line in enumerate(source.splitlines(), 1) if ".backward()" in line)
    assert backward - config.end_lineno <= 40  # within the first screen after TrainConfig


def test_package_takes_values_not_configs():
    found = []
    for path in (ROOT / "nanogpt").rglob("*.py"):
        if re.search(r"\bconfig: Any\b", path.read_text(encoding="utf-8")):
            found.append(path.name)
    assert not found
