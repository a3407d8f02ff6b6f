"""Q-Bench: share of right letters, where the rows have the right answers (the dev split).

python -m llava.eval.eval_qbench --result-file qbench/answers/llvisionqa_dev_llava-v1.5-7b.jsonl

The benchmark's own score reads free answers with a language model; this one counts an answer that gives the letter of
the right candidate (`B`, `B. text`, `The answer is B.`) or is its text. The rows are those of the question file with
the answers; `--question-file` sees whether all of them are there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import read_json, read_jsonl
from llava.eval.eval_science_qa import parse_answer
from llava.eval.scoring.matching import ADVICE, listed
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
    """1.0 or 0.0 for each row; None if the rows have no right answers (the test split).

    Raises:
        BadSampleError: some rows have a right answer and others have none, or one is none of the candidates.
    """
    rows = list(rows)
    unlabeled = [name_of(row) for row in rows if "correct_ans" not in row]
    if unlabeled and len(unlabeled) == len(rows):
        return None
    if unlabeled:
        raise BadSampleError(f"{len(unlabeled)} of {len(rows)} rows have no 'correct_ans': {listed(unlabeled)}")
    return [float(is_right(row)) for row in rows]


def name_of(row: dict[str, Any]) -> str:
    """What tells a row of Q-Bench from the others; it has no id."""
    return f"{row.get('img_path')}: {row.get('question')}"


def check_complete(question_file: str | Path, rows: Sequence[dict[str, Any]], result_file: str | Path) -> None:
    """Refuse answers that are not those to the questions of a file.

    Raises:
        BadSampleError: the file is broken, or questions and answers do not fit.
    """
    asked, answered = (Counter(map(name_of, some)) for some in (read_json(question_file, list), rows))
    # A question may be in the file twice; then it is answered twice.
    faults = {"questions have no answer": asked - answered, "answers belong to no question": answered - asked}
    messages = [f"{some.total()} {fault}: {listed(list(some))}" for fault, some in faults.items() if some]
    if messages:
        raise BadSampleError(f"{result_file}: does not fit {question_file}: {'; '.join(messages)}. {ADVICE}")


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_qbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--result-file", type=str, required=True, help="answers of llava.eval.model_vqa_qbench")
    parser.add_argument(
        "--question-file", type=str, default=None, help="what was asked: answers to all of it must be there"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> float | None:
    """Run the program; returns the accuracy in [0, 1], None where there are no right answers to compare with.

    Raises:
        BadSampleError: the file is missing, broken or empty, or does not fit `--question-file`.
    """
    args = build_parser().parse_args(argv)
    rows = [row for _, row in read_jsonl(args.result_file)]
    if not rows:
        raise BadSampleError(f"{args.result_file}: no answers here")
    if args.question_file is not None:
        check_complete(args.question_file, rows, args.result_file)
    scores = score(rows)
    if scores is None:
        print(f"{args.result_file}: no public answers to this split; submit the file to Q-Bench")
        return None
    print(f"Samples: {len(scores)}\nLetter accuracy: {100 * sum(scores) / len(scores):.2f}%")
    return sum(scores) / len(scores)


if __name__ == "__main__":
    run_program(main)
