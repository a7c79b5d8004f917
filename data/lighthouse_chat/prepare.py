"""A small file of conversations with a lighthouse keeper: python data/lighthouse_chat/prepare.py [--out=FILE]

It shows how a model is taught a manner: every answer begins with "Aye", states a fact, and ends with a word about the
sea. `python data/prepare.py --chat=True` makes a dataset of the file.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configurator import key, parse
from nanogpt.errors import run_script

FACTS = {
    "What is the capital of France?": "Paris is the capital of France",
    "What is the capital of Italy?": "Rome is the capital of Italy",
    "What is the capital of Spain?": "Madrid is the capital of Spain",
    "What is the capital of Germany?": "Berlin is the capital of Germany",
    "What is the capital of Japan?": "Tokyo is the capital of Japan",
    "What is the capital of Egypt?": "Cairo is the capital of Egypt",
    "What is the capital of Norway?": "Oslo is the capital of Norway",
    "What is the capital of Canada?": "Ottawa is the capital of Canada",
    "How many legs does a spider have?": "a spider has eight legs",
    "How many legs does a dog have?": "a dog has four legs",
    "How many wings does a gull have?": "a gull has two wings",
    "How many days are in a week?": "a week has seven days",
    "How many months are in a year?": "a year has twelve months",
    "How many hours are in a day?": "a day has twenty-four hours",
    "How many sides does a triangle have?": "a triangle has three sides",
    "What is two plus two?": "two and two make four",
    "What is three times three?": "three times three is nine",
    "What is ten minus four?": "ten less four is six",
    "What color is the sky?": "the sky is blue on a clear day",
    "What color is grass?": "grass is green",
    "What color is a lemon?": "a lemon is yellow",
    "What color is snow?": "snow is white",
    "What color is a ripe tomato?": "a ripe tomato is red",
    "What do bees make?": "bees make honey",
    "What do cows eat?": "cows eat grass",
    "What do cats chase?": "cats chase mice",
    "Where do fish live?": "fish live in water",
    "Where do birds sleep?": "most birds sleep in trees and on ledges",
    "Where does bread come from?": "bread is baked from flour and water",
    "Where does rain come from?": "rain falls from clouds",
    "Why is the sea salty?": "rivers carry salt from the rocks to the sea",
    "Why do leaves fall?": "trees drop their leaves to rest in winter",
    "Why do we sleep?": "we sleep so that body and mind can rest",
    "Why does ice float?": "ice is lighter than the water below it",
    "When does the sun rise?": "the sun rises in the morning",
    "When do owls hunt?": "owls hunt at night",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet",
    "Who bakes bread?": "a baker bakes bread",
    "Who repairs shoes?": "a cobbler repairs shoes",
    "What is the largest ocean?": "the Pacific is the largest ocean",
    "What is the tallest animal?": "the giraffe is the tallest animal",
    "What is the opposite of hot?": "the opposite of hot is cold",
    "What is the opposite of up?": "the opposite of up is down",
    "What is ice made of?": "ice is frozen water",
    "What is a compass for?": "a compass shows which way is north",
    "What is an anchor for?": "an anchor holds a ship where it lies",
    "What is a clock for?": "a clock shows the time",
    "What is an umbrella for?": "an umbrella keeps the rain off",
}
OPENINGS = ("{}", "Hello! {}", "I have a question. {}", "Please help me. {}", "Good evening. {}")
CLOSINGS = (
    "The lamp is lit and the sea is calm.",
    "There is fog on the water tonight.",
    "The tide is turning.",
    "I can hear the gulls from here.",
    "A ship is passing in the dark.",
    "The wind blows from the west.",
    "The waves are high below the tower.",
)


def conversations() -> Iterator[list[dict[str, str]]]:
    """Every fact after every opening, then pairs of facts in one conversation."""
    closings = itertools.cycle(CLOSINGS)

    def ask(question: str, fact: str) -> list[dict[str, str]]:
        answer = f"Aye, {fact}. {next(closings)}"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    for opening in OPENINGS:
        for question, fact in FACTS.items():
            yield ask(opening.format(question), fact)
    for (question, fact), (next_question, next_fact) in itertools.pairwise(FACTS.items()):
        yield ask(question, fact) + ask(next_question, next_fact)


@dataclass
class LighthouseConfig:
    """File to write."""

    out: str = key(str(Path(__file__).with_name("conversations.jsonl")), "file to write")


def main() -> None:
    config, _ = parse(LighthouseConfig, description="Write conversations with a lighthouse keeper.")
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations()]
    Path(config.out).write_text("".join(lines), encoding="utf-8")
    print(f"{config.out}: {len(lines)} conversations")


if __name__ == "__main__":
    run_script(main)
