"""Q-Bench: share of right letters, where the rows have the right answers (the dev split).

python -m llava.eval.eval_qbench --result-file qbench/answers/llvisionqa_dev_llava-v1.5-7b.jsonl

The benchmark's own score reads free answers with a language model; this one counts an answer that gives the letter of
the right candidate (`B`, `B. text`, `The answer is B.`) or is its text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import read_jsonl
from llava.eval.eval_science_qa import parse_answer
from llava.runtime.program import run_program

LETTERS = "ABCD"


def is_right(row: dict[str, Any]) -> bool:
    """True if the response of a row gives the right candidate.

    Raises:
        BadSampleError: the right answer is none of the candidates.
    """
    if row["correct_ans"] not in row["candidates"]:
        raise BadSampleError(f"{row['img_path']}: 'correct_ans' {row['correct_ans']!r} is none of {row['candidates']}")
    right, response = LETTERS[row["candidates"].index(row["correct_ans"])], row["response"].strip()
    return parse_answer(response, LETTERS) == right or response in (f"{right}.", row["correct_ans"])


def score(rows: Iterable[dict[str, Any]]) -> list[float] | None:
    """1.0 or 0.0 for each row; None if the rows have no right answers (the test split)."""
    rows = list(rows)
    return [float(is_right(row)) for row in rows] if all("correct_ans" in row for row in rows) else None


def build_parser() -> argparse.ArgumentParser:
    """The option of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_qbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--result-file", type=str, required=True, help="answers of llava.eval.model_vqa_qbench")
    return parser


def main(argv: Sequence[str] | None = None) -> float | None:
    """Run the program; returns the accuracy in [0, 1], None where there are no right answers to compare with.

    Raises:
        BadSampleError: the file is missing, broken or empty.
    """
    args = build_parser().parse_args(argv)
    scores = score(row for _, row in read_jsonl(args.result_file))
    if scores is None:
        print(f"{args.result_file}: no public answers to this split; submit the file to Q-Bench")
        return None
    if not scores:
        raise BadSampleError(f"{args.result_file}: no answers here")
    print(f"Samples: {len(scores)}\nLetter accuracy: {100 * sum(scores) / len(scores):.2f}%")
    return sum(scores) / len(scores)


if __name__ == "__main__":
    run_program(main)
