"""The documents match the code: keys, links, the index."""

import dataclasses
import json
import re
from pathlib import Path

from conftest import ROOT

import sample
import train

TRAIN_KEYS = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
    wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout
    bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend
    device dtype compile"""
SAMPLE_KEYS = "init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile"


def test_keys_of_nanogpt_are_all_there():
    """docs/from_nanogpt.md counts them."""
    for config, names in ((train.TrainConfig, TRAIN_KEYS), (sample.SampleConfig, SAMPLE_KEYS)):
        assert set(names.split()) <= {field.name for field in dataclasses.fields(config)}
    assert (len(TRAIN_KEYS.split()), len(SAMPLE_KEYS.split())) == (33, 11)


def prose(page: Path) -> str:
    """A page's Markdown, or a notebook's, without blocks of code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: small letters, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    shown = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in shown}


def test_links_lead_somewhere():
    pages = [page for kind in ("*.md", "*.ipynb", "docs/*.md", "runs/*/*.md") for page in ROOT.glob(kind)]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if ":" not in link]
    assert len(links) > 50
    assert {".md", ".ipynb"} == {page.suffix for page, _ in links}
    broken = []
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append((str(page.relative_to(ROOT)), link))
    assert not broken


def test_index_names_each_document():
    index = (ROOT / "INDEX.md").read_text()
    assert not [page.name for page in ROOT.glob("docs/*.*") if f"docs/{page.name}" not in index]
