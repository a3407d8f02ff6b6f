r"""ScienceQA: GPT-4 decides between its answer and the model's (upstream `llava/eval/eval_science_qa_gpt4_requery.py`).

python -m llava.eval.eval_science_qa_gpt4_requery --base-dir scienceqa --gpt4-result gpt4.json \
    --requery-result requery.jsonl --our-result answers.jsonl --output-result result.json

Prints each question that GPT-4 decided wrongly, then upstream's six lines, and writes the choices that count: GPT-4's
decision, or the model's answer where that names no choice. Every question of the split needs the first two answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

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
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

OURS, GPT4, REQUERY = "ours", "gpt4", "requery"
MISSING = "MISSING"
RULE = "====================================="


def read_all(args: argparse.Namespace) -> tuple[list[Problem], dict[str, str]]:
    """The questions of the split with their three answers, and the prompt of each.

    Raises:
        BadSampleError: a file is missing or broken, or a question has no answer of the model or of GPT-4.
    """
    problems, gpt4 = read_problems(args.base_dir, args.split), read_gpt4(args.gpt4_result)
    ours = read_answers(args.our_result, problems)
    check_reference(args.gpt4_result, gpt4, problems)
    requery = read_answers(args.requery_result, problems, all_asked=False)
    found = []
    for key, problem in problems.items():
        decided = requery[key]["text"] if key in requery else MISSING
        texts = {OURS: ours[key]["text"], GPT4: gpt4[key], REQUERY: decided}
        said = {name: predict(key, name, text, problem["choices"], args) for name, text in texts.items()}
        found.append(Problem(key, problem["answer"], said))
    return found, {key: str(ours[key].get("prompt", "")) for key in problems}


def counted(problem: Problem) -> str:
    """Whose choice counts for a question."""
    return OURS if problem.said[REQUERY].failed else REQUERY


def describe(problem: Problem, prompt: str, options: Sequence[str]) -> str:
    """A question that was decided wrongly, as upstream prints it."""
    names = {OURS: "Our", GPT4: "GPT-4", REQUERY: "Requery"}
    lines = [f"Question ({options[problem.answer]}): {prompt}"]
    lines += [f"{label} ({problem.said[name].letter}): {problem.said[name].text}" for name, label in names.items()]
    return "\n".join(["", *lines, RULE, ""])


def count(problems: Sequence[Problem]) -> dict[str, int]:
    """The numbers of upstream's lines."""
    return {
        "ours": sum(problem.right(OURS) for problem in problems),
        "gpt4": sum(problem.right(GPT4) for problem in problems),
        "failed": sum(problem.said[GPT4].failed for problem in problems),
        "visual": sum(problem.right(OURS if problem.said[GPT4].failed else GPT4) for problem in problems),
        "requery": sum(problem.right(counted(problem)) for problem in problems),
        "upper": sum(problem.right(OURS) or problem.right(GPT4) for problem in problems),
    }


def result_of(problems: Sequence[Problem], counts: Mapping[str, int]) -> dict[str, Any]:
    """What is written: upstream's keys, of which `outputs` stays empty."""
    correct, total = counts["requery"], len(problems)
    results = {problem.key: problem.said[counted(problem)].index for problem in problems}
    return {"acc": correct / total * 100, "correct": correct, "count": total, "results": results, "outputs": {}}


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--seed`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_science_qa_gpt4_requery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--requery-result", type=str, required=True, help="GPT-4's decisions, JSON lines")
    parser.add_argument("--output-result", type=str, required=True, help="write accuracy and choices here")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; returns what is written.

    Raises:
        FlagError: the output would fall on an input.
        BadSampleError: see `read_all`.
    """
    args = build_parser().parse_args(argv)
    names = ("our_result", "gpt4_result", "requery_result")
    refuse_file(
        "--output-result", args.output_result, [Input(f"--{n.replace('_', '-')}", getattr(args, n)) for n in names]
    )
    problems, prompts = read_all(args)
    for problem in problems:
        if not problem.said[REQUERY].failed and not problem.right(REQUERY):
            print(describe(problem, prompts[problem.key], args.options))
    counts, total = count(problems), len(problems)
    print(line(total, "Our-Correct", counts["ours"]))
    print(line(total, "GPT-4-Correct", counts["gpt4"]))
    print(line(total, "GPT-4 NO-ANS (RANDOM)", counts["failed"], "Percentage"))
    print(line(total, "GPT-4-OursVisual-Correct", counts["visual"]))
    print(line(total, "Requery-Correct", counts["requery"]))
    print(line(total, "Correct upper", counts["upper"]))
    result = result_of(problems, counts)
    replace_text(args.output_result, json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    run_program(main)
