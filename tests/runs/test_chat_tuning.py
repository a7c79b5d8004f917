"""A model learns to answer: data/prepare.py --chat, train.py, sample.py --chat, export.py."""

import json
import runpy
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ROOT, Run, call_main
from texts import answer_texts

import export
import sample
from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.text.chat import PLAIN_TEMPLATE
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

ANSWERS = {"Who?": "I.", "Where?": "Here.", "When?": "Now.", "Why?": "Because.", "How?": "So.", "And?": "No."}
PREPARE = runpy.run_path(str(ROOT / "data/prepare.py"))["main"]
SAMPLE = ["--device=cpu", "--dtype=float32", "--temperature=0", "--checkpoint=latest", "--chat=True"]


def test_a_model_learns_to_answer(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": question, "completion": answer} for question, answer in ANSWERS.items()] * 30
    Path("talk.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "!"}])))
    Path("talk.txt").write_text("Hello")
    flags = ("--out=talk", "--tokenizer=byte", "--chat=True", "--workers=1")
    with pytest.raises(InputError, match=r"talk\.txt.* \.jsonl or \.parquet"):
        call_main(PREPARE, "--input=talk.txt", *flags)
    with pytest.raises(InputError, match=r"line 181.* neither messages nor completion.*--skip_bad=True"):
        call_main(PREPARE, "--input=talk.jsonl", *flags)
    call_main(PREPARE, "--input=talk.jsonl", "--skip_bad=True", "--val_share=0.4", *flags)
    meta = json.loads(Path("talk/meta.json").read_text())
    assert meta["bad"][0] == 1
    assert sum(split["documents"] for split in meta["splits"].values()) == 180

    tokens = open_dataset("talk", block_size=8, verify=True).train
    tokenizer = Tokenizer.load("talk")
    assert tokenizer is not None
    texts = answer_texts(tokenizer, tokens[:], tokens.mask(0, len(tokens)))
    assert set(texts) <= {answer + END_OF_TEXT for answer in ANSWERS.values()}

    run(out_dir="out", dataset="talk", max_iters=300, lr_decay_iters=300, eval_interval=100, n_embd=32, block_size=48)
    capsys.readouterr()
    learned = [question for question, answer in ANSWERS.items() if answer + END_OF_TEXT in texts]
    first, second = learned[:2]
    call_main(sample.main, *SAMPLE, "--out_dir=out", f"--start={second}", "--num_samples=2")
    assert capsys.readouterr().out.split(sample.SEPARATOR) == [ANSWERS[second]] * 2 + [""]

    lines = [first, second, "", second, first * 20]
    monkeypatch.setattr("builtins.input", Mock(side_effect=[*lines, EOFError]))
    call_main(sample.main, *SAMPLE, "--out_dir=out", "--interactive=True")
    printed = capsys.readouterr()
    answer, _, again = printed.out.splitlines()
    assert (answer, again) == (ANSWERS[first], ANSWERS[second])
    assert "context" in printed.err  # of the last, which is too long

    call_main(export.main, "--out_dir=out", "--to=exported")
    assert Path("exported/chat_template.jinja").read_text() == PLAIN_TEMPLATE
    with pytest.raises(InputError, match="start"):
        call_main(sample.main, *SAMPLE, "--out_dir=out")


def test_sample_refuses_to_chat_without_a_template(run: Run):
    run(max_iters=1)
    with pytest.raises(InputError, match="has no chat template"):
        call_main(sample.main, *SAMPLE, "--start=x")
