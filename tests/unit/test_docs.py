"""The documents match the code: keys, links, the names of files and tests."""

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
PAGES = sorted(page for pattern in ("*.md", "*.ipynb", "docs/*.md", "runs/*/*.md") for page in ROOT.glob(pattern))
HISTORY = "imports_0_1.md"  # names files of version 0.1


def prose(page: Path) -> str:
    """A page's Markdown, or a notebook's, without code blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    texts = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def test_nanogpt_keys_are_all_accepted():
    for config, names in ((train.TrainConfig, TRAIN_KEYS), (sample.SampleConfig, SAMPLE_KEYS)):
        assert set(names.split()) <= {field.name for field in dataclasses.fields(config)}
    numbers = f"all {len(TRAIN_KEYS.split())} of `train.py` and all {len(SAMPLE_KEYS.split())} of `sample.py`"
    assert numbers in (ROOT / "docs/from_nanogpt.md").read_text(encoding="utf-8")


def test_links_have_targets():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if ":" not in link]
    assert len(links) > 50
    assert {".md", ".ipynb"} == {page.suffix for page, _ in links}
    broken = []
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append((str(page.relative_to(ROOT)), link))
    assert not broken


def test_files_and_tests_in_code_spans_exist():
    """Paths such as `nanogpt/optim.py`, from the root or the package, and names such as `test_links_have_targets`."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    missing = []
    for page in PAGES:
        spans = [] if page.name == HISTORY else re.findall(r"`([^`\n]+)`", prose(page))
        for word in {word for span in spans for word in span.split()}:
            is_test = re.fullmatch(r"test_\w+", word)
            is_path = (
                re.fullmatch(r"[\w/*-]+\.(py|sh|ipynb)|(nanogpt|tests|docs|runs)/[\w/]*", word) and "X" not in word
            )
            exists = not is_path or any(next(folder.glob(word), None) for folder in (ROOT, ROOT / "nanogpt"))
            if not exists or (is_test and f"def {word}(" not in tests):
                missing.append((str(page.relative_to(ROOT)), word))
    assert not missing


def test_index_names_each_file():
    """Of the root, the package and docs/; config/ and data/ by their scripts."""
    index = (ROOT / "INDEX.md").read_text(encoding="utf-8")
    patterns = ("*.py", "*.ipynb", "nanogpt/**/*.py", "data/**/*.py", "config/[!e]*.py", "docs/*.*")
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.name != "__init__.py"]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    assert len(names) > 60
    assert not [name for name in names if f"`{name}`" not in index]
