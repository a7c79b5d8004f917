"""The house as it is drawn, and the rules for its arrows."""

import runpy

from conftest import ROOT

DRAWN = runpy.run_path(str(ROOT / "docs/architecture.py"))


def test_the_picture_is_that_of_the_imports():
    """Where this fails, `python docs/architecture.py` draws it anew."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert "train --> dial" in page
    assert DRAWN["page"]() == page


def test_arrows_point_down_and_there_are_no_circles():
    arrows = DRAWN["imports"]()
    assert {"nanogpt.optim", "model"} <= DRAWN["reach"](arrows, "train")
    for name in arrows:
        needed = DRAWN["reach"](arrows, name)
        assert name not in needed
        if name.startswith("nanogpt."):
            assert all(other.startswith("nanogpt.") for other in needed), name
    assert arrows["model"] == set()  # which runs when copied alone
