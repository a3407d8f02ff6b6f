"""TextVQA: soft accuracy of answers files (upstream `llava/eval/eval_textvqa.py`).

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers/llava-v1.5-7b.jsonl

Prints the same lines as upstream. An answer belongs to the question of the same image that its prompt holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_json, read_jsonl
from llava.eval.m4c_evaluator import Prediction, TextVQAAccuracyEvaluator
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


def pair(annotation_file: str | Path, result_file: str | Path) -> list[tuple[dict[str, Any], Prediction]]:
    """Each row of the answers file with its answer and the annotators' answers, in file order.

    Raises:
        BadSampleError: a file is broken, or an answer belongs to no question; names the row.
    """
    annotations = {
        (row["image_id"], row["question"].lower()): row["answers"] for row in read_json(annotation_file, dict)["data"]
    }
    pairs = []
    for where, row in read_jsonl(result_file):
        key = field(row, "question_id", (str, int), where), question_of(field(row, "prompt", (str,), where), where)
        if key not in annotations:
            raise BadSampleError(f"{where}: {annotation_file} has no question {key[1]!r} about image {key[0]!r}")
        pairs.append((row, Prediction(pred_answer=field(row, "text", (str,), where), gt_answers=annotations[key])))
    return pairs


def eval_single(annotation_file: str | Path, result_file: str | Path) -> float:
    """Score one answers file and print upstream's lines.

    Returns:
        the accuracy, in [0, 1].

    Raises:
        BadSampleError: as `pair`, or there are no answers.
    """
    predictions = [prediction for _, prediction in pair(annotation_file, result_file)]
    accuracy = TextVQAAccuracyEvaluator().eval_pred_list(predictions)
    print(Path(result_file).stem)
    print(f"Samples: {len(predictions)}\nAccuracy: {100 * accuracy:.2f}%\n")
    return accuracy


def build_parser() -> argparse.ArgumentParser:
    """The original options."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_textvqa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotation-file", type=str, required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", type=str, help="answers of one model")
    parser.add_argument("--result-dir", type=str, help="folder: score every .jsonl file in it")
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
        accuracies.append(eval_single(args.annotation_file, args.result_file))
    if args.result_dir is not None:
        for path in sorted(Path(args.result_dir).iterdir()):
            if path.suffix != ".jsonl":
                print(f"Skipping {path.name}")
                continue
            accuracies.append(eval_single(args.annotation_file, path))
    return accuracies


if __name__ == "__main__":
    run_program(main)
