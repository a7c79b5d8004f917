"""What every engine's script does: read a job, ask the engine, write its answers as JSON.

A job is a JSON file: `folder` (an exported model), `gguf` (the same as a GGUF file), `work` (an empty folder), `texts`
to encode, `ids` with the `likeliest` ids that may follow each, and `prompts` to continue by at most `new` ids.
"""

import json
import sys
from importlib.metadata import version


def answer(engine_class, *packages):
    """Write the versions of `packages`, and what the engine makes of the job sys.argv[1], to sys.argv[2].

    engine_class(job) loads the model; its `encode(text)` gives ids; its `logprobs(ids)` a row for each position, from
    which an id takes its log-probability; its `generate(ids, new)` the ids that follow, without an end token.
    """
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
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
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)
