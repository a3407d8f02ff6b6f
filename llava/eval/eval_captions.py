"""COCO-style captions: CIDEr and BLEU-4 of one caption per image.

python -m llava.eval.eval_captions --annotation-file captions_val2014.json --result-file answers.jsonl

The annotation file is COCO's (`images` with id and file_name, `annotations` with image_id and caption); the question_id
of an answer is the image's id. COCO's tokenizer is a Java program: see `llava/eval/scoring/captions.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.answers import Task
from llava.eval.answering.questions import read_json
from llava.eval.scoring.captions import TOKENIZERS, bleu4, cider, pair
from llava.eval.scoring.matching import Sides, by_id, check_fit, id_of, read_matching
from llava.runtime.program import run_program

PROMPT = "Provide a one-sentence caption for the provided image."


def read_tasks(annotation_file: str | Path) -> list[Task]:
    """One task for each image that has captions, in the file's order; the captions are in `extra`.

    Raises:
        BadSampleError: the file is broken or has no image with captions.
    """
    annotation = read_json(annotation_file, dict)
    captions: dict[int, list[str]] = {}
    for row in annotation["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    tasks = [
        Task(row["id"], PROMPT, PROMPT, (row["file_name"],), f"{annotation_file}: image {row['id']}", extra)
        for row in annotation["images"]
        if (extra := {"captions": captions.get(row["id"], [])})["captions"]
    ]
    if not tasks:
        raise BadSampleError(f"{annotation_file}: no image with captions here")
    return tasks


def score(
    tasks: Sequence[Task], texts: Mapping[Any, str], tokenizer: str = "ptb"
) -> tuple[dict[str, float], list[float]]:
    """CIDEr and BLEU-4 of one caption for each task.

    Returns:
        both scores by name, and the CIDEr of each caption.

    Raises:
        BadSampleError: a task has no answer, or an answer no task.
        FlagError: what the tokenizer needs is missing.
    """
    asked = [task.question_id for task in tasks]
    check_fit(asked, list(texts), Sides("the captions", "the images"))
    captions_by_id = by_id(texts)
    answers = [captions_by_id[id_of(key)] for key in asked]
    captions = pair(answers, [task.extra["captions"] for task in tasks], tokenizer)
    whole, each = cider(captions)
    return {"CIDEr": whole, "BLEU-4": bleu4(captions)}, each


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotation-file", type=str, required=True, help="captions in COCO's format")
    parser.add_argument("--result-file", type=str, required=True, help="answers of `python -m llava.eval coco_caption`")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="ptb", help="plain needs no Java; other numbers")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program.

    Raises:
        BadSampleError: a file is broken, or captions and images do not fit.
        FlagError: what the tokenizer needs is missing.
    """
    args = build_parser().parse_args(argv)
    tasks = read_tasks(args.annotation_file)
    texts = read_matching(args.result_file, [task.question_id for task in tasks], args.annotation_file)
    scores, _ = score(tasks, texts, args.tokenizer)
    for name, value in scores.items():
        print(f"{name}: {100 * value:.2f}")
    return scores


if __name__ == "__main__":
    run_program(main)
