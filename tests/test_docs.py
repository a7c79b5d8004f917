"""The documents that are made from the code are those that the code makes now."""

import graphlib
import runpy
from types import SimpleNamespace

import pytest
from conftest import ROOT

architecture = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "architecture.py")))


def test_the_picture_of_the_house_is_up_to_date() -> None:
    picture = architecture.BEGIN + architecture.draw(architecture.read()) + architecture.END
    assert picture in architecture.PAGE.read_text(encoding="utf-8"), "run `python docs/architecture.py`"


def test_arrows_point_down_and_never_in_a_circle() -> None:
    graph = architecture.read()
    assert {"train.py", "model.py", "data/", "nanogpt/distributed.py"} <= graph.keys()
    assert "nanogpt/data.py" in graph["train.py"]  # `from nanogpt import data` is seen
    graphlib.TopologicalSorter(graph).prepare()  # CycleError
    arrows = [(node, target) for node in graph for target in graph[node]]
    assert not [arrow for arrow in arrows if arrow[0].startswith("nanogpt/") > arrow[1].startswith("nanogpt/")]
    assert not graph["nanogpt/distributed.py"]
    assert not graph["nanogpt/files.py"]
    assert not any(graph["model.py"].values()), "model.py imports at its top what it cannot take along"
    assert "nanogpt/sources.py" not in architecture.reached(graph, "train.py")


def test_only_arrows_that_do_not_follow_from_others_are_drawn() -> None:
    graph = {"a.py": {"b.py": True, "nanogpt/c.py": True}, "b.py": {"nanogpt/c.py": False}, "nanogpt/c.py": {}}
    arrows = [line.strip() for line in architecture.draw(graph).splitlines() if ">" in line]
    assert arrows == ["a_ --> b_", "b_ -.-> nanogpt_c_"]
    with pytest.raises(graphlib.CycleError):
        architecture.draw(graph | {"nanogpt/c.py": {"a.py": True}})
