"""ScienceQA: accuracy of answers to multiple-choice questions (upstream `llava/eval/eval_science_qa.py`).

python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file answers.jsonl \
    --output-file output.json --output-result result.json

Prints upstream's line and writes its two files. A question without an answer is an error; upstream counts it as wrong,
and so does `--lenient`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import field, read_json, read_jsonl
from llava.eval.scoring.matching import Sides, add_lenient, check_fit, id_of, listed, refuse_unlabeled
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

FAILED = "FAILED"
# Upstream's pattern: one arbitrary character after the letter.
STATED = re.compile(r"The answer is ([A-Z]).")
MISSING = {"text": FAILED, "prompt": "Unknown"}
IMAGE = "<image>"


def parse_answer(text: str, options: Sequence[str]) -> str:
    """The letter that an answer gives, or `FAILED`.

    That is the whole text, or its first character before `. `, or the only letter that "The answer is X." names.
    """
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    stated = STATED.findall(text)
    return stated[0] if len(stated) == 1 else FAILED


def option_index(letter: str, choices: Sequence[str], options: Sequence[str]) -> int:
    """Index of the choice that a letter names; -1 if there are not so many choices."""
    known = list(options[: len(choices)])
    return known.index(letter) if letter in known else -1


@dataclass(frozen=True)
class ScienceQAScore:
    """The two files of upstream's program, and the counts of its printed line.

    Attributes:
        output: `correct` and `incorrect`: an analysis of each question.
        result: `acc`, `correct`, `count`, `results` and `outputs` by question.
        image_n: number of questions with an image, known by their prompt.
        image_correct: right answers among them.
    """

    output: dict[str, list[dict[str, Any]]]
    result: dict[str, Any]
    image_n: int
    image_correct: int

    def __str__(self) -> str:
        """Upstream's line; without image questions upstream ends with a ZeroDivisionError."""
        images = f"{self.image_correct / self.image_n * 100:.2f}%" if self.image_n else "no such questions"
        r = self.result
        return f"Total: {r['count']}, Correct: {r['correct']}, Accuracy: {r['acc']:.2f}%, IMG-Accuracy: {images}"


def evaluate(
    base_dir: str | Path,
    result_file: str | Path,
    split: str = "test",
    options: Sequence[str] = "ABCDE",
    *,
    only_answered: bool = False,
    lenient: bool = False,
) -> ScienceQAScore:
    """Score an answers file.

    Args:
        base_dir: folder with `problems.json` and `pid_splits.json`.
        result_file: JSON lines with question_id, prompt and text.
        split: which list of `pid_splits.json`.
        options: the letters of the choices, in order.
        only_answered: leave out what has no answer.
        lenient: count what has no answer as wrong, and leave out answers to questions of other splits.

    Raises:
        BadSampleError: a file is missing or broken, the split is unknown or empty, a question of it has no problem, or
            (without `lenient`) answers and questions do not fit.
    """
    base = Path(base_dir)
    splits = read_json(base / "pid_splits.json", dict)
    if not splits.get(split):
        raise BadSampleError(f"{base / 'pid_splits.json'}: no questions in split '{split}'; it has {sorted(splits)}")
    problems = read_json(base / "problems.json", dict)
    asked = list(dict.fromkeys(map(id_of, splits[split])))
    refuse_absent(asked, problems, base)
    rows = [(field(row, "question_id", (str, int), where), where, row) for where, row in read_jsonl(result_file)]
    for _, where, row in rows:
        field(row, "text", (str,), where), field(row, "prompt", (str,), where)
    answers = {id_of(key): row for key, _, row in rows}
    chosen = [key for key in asked if key in answers] if only_answered else asked
    check_fit(chosen, [key for key, _, _ in rows], Sides(result_file, f"split '{split}' of {base}"), lenient=lenient)
    output: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    results, outputs = {}, {}
    for key in chosen:
        problem, answer = problems[key], answers.get(key, MISSING)
        letter = parse_answer(answer["text"], options)
        results[key] = option_index(letter, problem["choices"], options)
        outputs[key] = answer["text"]
        analysis = {
            "question_id": key,
            "parsed_ans": letter,
            "ground_truth": options[problem["answer"]],
            "question": answer["prompt"],
            "pred": answer["text"],
            "is_multimodal": IMAGE in answer["prompt"],
        }
        output["correct" if results[key] == problem["answer"] else "incorrect"].append(analysis)
    right, count = len(output["correct"]), len(results)
    images = {name: sum(row["is_multimodal"] for row in rows) for name, rows in output.items()}
    result = {"acc": right / count * 100, "correct": right, "count": count, "results": results, "outputs": outputs}
    return ScienceQAScore(output, result, sum(images.values()), images["correct"])


def refuse_absent(asked: Sequence[str], problems: Mapping[str, Any], base_dir: Path) -> None:
    """Refuse a split that has questions without a problem.

    Raises:
        BadSampleError: there are some; the message names them.
    """
    absent = [key for key in asked if key not in problems]
    if absent:
        raise BadSampleError(
            f"{base_dir / 'problems.json'}: has no problem for {len(absent)} questions of the split: {listed(absent)}; "
            "are both files of one download?"
        )
    refuse_unlabeled([key for key in asked if "answer" not in problems[key]], base_dir / "problems.json", "answer")


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--lenient`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_science_qa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base-dir", type=str, required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--result-file", type=str, required=True, help="answers file")
    parser.add_argument("--output-file", type=str, required=True, help="write the analysis of each question here")
    parser.add_argument("--output-result", type=str, required=True, help="write accuracy and parsed answers here")
    parser.add_argument("--split", type=str, default="test", help="split of pid_splits.json")
    parser.add_argument("--options", type=list, default=list("ABCDE"), help="letters of the choices, as ABCDE")
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> ScienceQAScore:
    """Run the program.

    Raises:
        BadSampleError: see `evaluate`.
    """
    args = build_parser().parse_args(argv)
    inputs = [Input("--base-dir", args.base_dir), Input("--result-file", args.result_file)]
    for flag, path in (("--output-file", args.output_file), ("--output-result", args.output_result)):
        refuse_file(flag, path, inputs)
    refuse_file("--output-result", args.output_result, [Input("--output-file", args.output_file)])
    score = evaluate(args.base_dir, args.result_file, args.split, args.options, lenient=args.lenient)
    print(score)
    replace_text(args.output_file, json.dumps(score.output, indent=2))
    replace_text(args.output_result, json.dumps(score.result, indent=2))
    return score


if __name__ == "__main__":
    run_program(main)
