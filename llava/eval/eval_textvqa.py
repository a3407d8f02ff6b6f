"""TextVQA: soft accuracy of answers files (upstream `llava/eval/eval_textvqa.py`).

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers/llava-v1.5-7b.jsonl

Prints the same lines as upstream. An answer belongs to the question of the same image that its prompt holds. Questions
without an answer are an error; upstream scores the others, and so does `--lenient`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_json, read_jsonl
from llava.eval.m4c_evaluator import Prediction, TextVQAAccuracyEvaluator
from llava.eval.scoring.matching import Sides, add_lenient, check_fit, id_of, refuse_unlabeled
from llava.runtime.program import run_program

OCR_MARKER = "Reference OCR token: "
OCR_PROMPT = "OCR tokens: "
QUESTION, ANSWER = "Question: ", " Short answer:"


def question_of(prompt: str, where: str = "prompt") -> str:
    """The question that a prompt of one of the three published forms holds, in lower case.

    Args:
        prompt: as the answers file shows it.
        where: names the row in errors.

    Raises:
        BadSampleError: the prompt has none of the forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith(OCR_PROMPT) and QUESTION in prompt:
        return prompt.partition(QUESTION)[2].partition(ANSWER)[0].lower()
    if OCR_MARKER in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR_MARKER) else 0].lower()
    if OCR_MARKER not in prompt and len(lines) == 2:
        return lines[0].lower()
    raise BadSampleError(
        f"{where}: cannot tell the question from the instruction in {prompt!r}; a TextVQA prompt is the question and "
        f"one line of instruction, with at most one line of '{OCR_MARKER}' before or after the question"
    )


def pair(
    annotation_file: str | Path, result_file: str | Path, *, lenient: bool = False
) -> list[tuple[dict[str, Any], Prediction]]:
    """Each row of the answers file with its answer and the annotators' answers, in file order.

    Raises:
        BadSampleError: a file is broken, an answer belongs to no question (names the row), or (without `lenient`) a
            question has no answer or several.
    """
    annotated = read_json(annotation_file, dict)["data"]
    asked = [(id_of(row["image_id"]), row["question"].lower()) for row in annotated]
    unlabeled = [
        f"{image}: {question}" for (image, question), row in zip(asked, annotated, strict=True) if "answers" not in row
    ]
    refuse_unlabeled(unlabeled, annotation_file, "answers")
    annotations = {key: row["answers"] for key, row in zip(asked, annotated, strict=True)}
    pairs, answered = [], []
    for where, row in read_jsonl(result_file):
        image = id_of(field(row, "question_id", (str, int), where))
        key = image, question_of(field(row, "prompt", (str,), where), where)
        if key not in annotations:
            raise BadSampleError(f"{where}: {annotation_file} has no question {key[1]!r} about image {key[0]!r}")
        answered.append(key)
        pairs.append((row, Prediction(pred_answer=field(row, "text", (str,), where), gt_answers=annotations[key])))
    _check_counts(asked, answered, Sides(result_file, annotation_file), lenient)
    return pairs


def _check_counts(asked: list[tuple[str, str]], answered: list[tuple[str, str]], sides: Sides, lenient: bool) -> None:
    """As `check_fit`, for questions that may be annotated several times, and are then answered as often."""

    def numbered(keys: list[tuple[str, str]]) -> list[str]:
        seen: Counter[tuple[str, str]] = Counter()
        names = []
        for key in keys:
            seen[key] += 1
            names.append(f"{key[0]}: {key[1]}" + (f" ({seen[key]})" if seen[key] > 1 else ""))
        return names

    check_fit(numbered(asked), numbered(answered), sides, lenient=lenient)


def eval_single(annotation_file: str | Path, result_file: str | Path, *, lenient: bool = False) -> float:
    """Score one answers file and print upstream's lines.

    Returns:
        the accuracy, in [0, 1].

    Raises:
        BadSampleError: as `pair`, or there are no answers.
    """
    predictions = [prediction for _, prediction in pair(annotation_file, result_file, lenient=lenient)]
    accuracy = TextVQAAccuracyEvaluator().eval_pred_list(predictions)
    print(Path(result_file).stem)
    print(f"Samples: {len(predictions)}\nAccuracy: {100 * accuracy:.2f}%\n")
    return accuracy


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--lenient`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_textvqa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotation-file", type=str, required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", type=str, help="answers of one model")
    parser.add_argument("--result-dir", type=str, help="folder: score every .jsonl file in it")
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Run the program; returns the accuracies in the order in which they are printed.

    Raises:
        FlagError: neither a file nor a folder is given.
        BadSampleError: see `pair`.
    """
    args = build_parser().parse_args(argv)
    if args.result_file is None and args.result_dir is None:
        raise FlagError("give --result-file or --result-dir: there is nothing to score")
    accuracies = []
    if args.result_file is not None:
        accuracies.append(eval_single(args.annotation_file, args.result_file, lenient=args.lenient))
    if args.result_dir is not None:
        for path in sorted(Path(args.result_dir).iterdir()):
            if path.suffix != ".jsonl":
                print(f"Skipping {path.name}")
                continue
            accuracies.append(eval_single(args.annotation_file, path, lenient=args.lenient))
    return accuracies


if __name__ == "__main__":
    run_program(main)
