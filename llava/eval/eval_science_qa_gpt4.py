"""ScienceQA: GPT-4 answers, the model where GPT-4 does not (upstream `llava/eval/eval_science_qa_gpt4.py`).

python -m llava.eval.eval_science_qa_gpt4 --base-dir scienceqa --gpt4-result gpt4.json --our-result answers.jsonl

Prints upstream's three lines. Both must have answered every question; `--lenient` counts those that both have, as
upstream does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.errors import BadSampleError
from llava.eval.scoring.matching import add_lenient
from llava.eval.scoring.science_qa import (
    Problem,
    add_options,
    check_reference,
    line,
    predict,
    read_answers,
    read_gpt4,
    read_problems,
)
from llava.runtime.program import run_program

OURS, GPT4 = "ours", "gpt4"


def read_both(args: argparse.Namespace) -> list[Problem]:
    """The questions with an answer of the model and one of GPT-4.

    Raises:
        BadSampleError: a file is missing or broken, answers and questions do not fit, or no question has both answers.
    """
    problems, gpt4 = read_problems(args.base_dir, args.split), read_gpt4(args.gpt4_result)
    ours = read_answers(args.our_result, problems, lenient=args.lenient)
    check_reference(args.gpt4_result, gpt4, problems, lenient=args.lenient)
    both = []
    for key, problem in problems.items():
        if key in ours and key in gpt4:
            texts = {OURS: ours[key]["text"], GPT4: gpt4[key]}
            said = {name: predict(key, name, text, problem["choices"], args) for name, text in texts.items()}
            both.append(Problem(key, problem["answer"], said))
    if not both:
        raise BadSampleError(
            f"{args.our_result} and {args.gpt4_result}: no question of split '{args.split}' is answered in both"
        )
    if len(both) < len(problems):
        print(f"{len(problems) - len(both)} of {len(problems)} questions are not answered in both files and left out")
    return both


def build_parser() -> argparse.ArgumentParser:
    """The original options, `--seed` and `--lenient`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_science_qa_gpt4",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Run the program; returns the counts `total`, `correct`, `upper` and `failed`.

    Raises:
        BadSampleError: see `read_both`.
    """
    problems = read_both(build_parser().parse_args(argv))
    failed = [problem for problem in problems if problem.said[GPT4].failed]
    counts = {
        "total": len(problems),
        "correct": sum(problem.right(OURS if problem.said[GPT4].failed else GPT4) for problem in problems),
        # Where GPT-4 does not answer, upstream counts the model's choice for both.
        "upper": sum(
            problem.right(OURS) or (not problem.said[GPT4].failed and problem.right(GPT4)) for problem in problems
        ),
        "failed": len(failed),
    }
    total = counts["total"]
    print(line(total, "Correct", counts["correct"]))
    print(line(total, "Correct (upper)", counts["upper"]))
    print(line(total, "GPT-4 NO-ANS (RANDOM)", counts["failed"], "Percentage"))
    return counts


if __name__ == "__main__":
    run_program(main)
