"""The example data of text fine-tuning: instruction records whose answers a rule gives, so that a test can check them.

    python -m playground.instructions scripts/hydralora/data/example_data

Writes `train.json` and `test.json`, in the format that `hydralora.finetune` reads. Four tasks, each with its
`task_type`, so that expert utilization by task has something to show; no record of the test file is in the other one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from llava.runtime.output import replace_text
from llava.runtime.program import run_program

Record = dict[str, Any]

SEED = 41
TRAIN_RECORDS, TEST_RECORDS = 96, 16
WORDS = ("apple", "bridge", "cloud", "dragon", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle")
WORDS += ("lantern", "meadow", "needle", "orchard", "pencil", "river", "saddle", "table", "violin", "window")


def add_numbers(random: Random) -> tuple[str, str, str]:
    """Instruction, input and output of a sum."""
    first, second = random.randint(10, 99), random.randint(10, 99)
    return "Add the two numbers.", f"{first} and {second}", str(first + second)


def sort_words(random: Random) -> tuple[str, str, str]:
    """Instruction, input and output of words in alphabetical order."""
    words = random.sample(WORDS, 4)
    return "Put the words in alphabetical order.", ", ".join(words), ", ".join(sorted(words))


def count_letters(random: Random) -> tuple[str, str, str]:
    """Instruction, input and output of a letter that is counted."""
    words = " ".join(random.sample(WORDS, 3))
    letter = random.choice("aeinr")
    return f"How often does the letter {letter} occur?", words, str(words.count(letter))


def larger_number(random: Random) -> tuple[str, str, str]:
    """Instruction, no input and output of a comparison."""
    first, second = random.sample(range(100, 1000), 2)
    return f"Which number is larger, {first} or {second}?", "", str(max(first, second))


TASKS: tuple[Callable[[Random], tuple[str, str, str]], ...] = (add_numbers, sort_words, count_letters, larger_number)
"""The tasks in the order of their `task_type`."""


def make_records(count: int, seed: int = SEED) -> list[Record]:
    """`count` different records, the tasks in turn.

    Args:
        count: how many.
        seed: the same seed gives the same records.
    """
    random, found = Random(seed), dict[tuple[str, str], Record]()
    while len(found) < count:
        task = len(found) % len(TASKS)
        instruction, given, output = TASKS[task](random)
        record = {"instruction": instruction, "input": given, "output": output, "task_type": task}
        found.setdefault((instruction, given), record)
    return list(found.values())


def write_records(folder: str | Path) -> list[Path]:
    """Write the two files into a folder; returns their paths."""
    records = make_records(TRAIN_RECORDS + TEST_RECORDS)
    parts = {"train.json": records[:TRAIN_RECORDS], "test.json": records[TRAIN_RECORDS:]}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [replace_text(folder / name, json.dumps(rows, indent=1) + "\n") for name, rows in parts.items()]


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.instructions", description="Write the example data of text fine-tuning."
    )
    parser.add_argument("folder", type=Path, help="folder for train.json and test.json")
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the program; returns the files."""
    paths = write_records(build_parser().parse_args(argv).folder)
    print("written: " + ", ".join(map(str, paths)))
    return paths


if __name__ == "__main__":
    run_program(main)
