"""What every engine's script does: read jobs, ask the engine, write its answers as JSON.

A job is a folder with job.json: `folder` (an exported model), `gguf` (the same as a GGUF file), `work` (an empty
folder), `texts` to encode, `ids` with the `likeliest` ids that may follow each, and `prompts` to continue by at most
`new` ids.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


def answer(engine_class, *packages):
    """Write answers.json into each folder of sys.argv: the versions of `packages`, and the engine's answers.

    engine_class(job) loads the model; its `encode(text)` gives ids; its `logprobs(ids)` a row for each position, from
    which an id takes its log-probability; its `generate(ids, new)` the ids that follow, without an end token.
    """
    for folder in map(Path, sys.argv[1:]):
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        answers = answer_job(engine_class, packages, job)
        (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


def answer_job(engine_class, packages, job):
    answers = {"versions": {package: version(package) for package in packages}, "errors": {}}
    engine = None

    def load():
        nonlocal engine
        engine = engine_class(job)
        return True

    def encode(text):
        try:
            return [int(token) for token in engine.encode(text)]
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]

    def logprobs():
        rows = engine.logprobs(job["ids"])
        return [[float(row[token]) for token in tokens] for row, tokens in zip(rows, job["likeliest"], strict=True)]

    parts = {
        "loads": load,
        "ids": lambda: [encode(text) for text in job["texts"]],
        "logprobs": logprobs,
        "continuations": lambda: [[int(token) for token in engine.generate(ids, job["new"])] for ids in job["prompts"]],
    }
    for name, part in parts.items():
        if name == "loads" or engine is not None:
            try:
                answers[name] = part()
            except BaseException as error:  # some engines raise panics of other languages
                lines = str(error).strip().splitlines() or [""]
                answers["errors"][name] = f"{type(error).__name__}: {lines[0]}"[:300]
    return answers
