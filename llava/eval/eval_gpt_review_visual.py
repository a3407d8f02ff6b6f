r"""Let a language model compare answers about images that it knows by captions and boxes (upstream's program).

OPENAI_API_KEY=... python -m llava.eval.eval_gpt_review_visual --question qa90_questions.jsonl \
    --context caps_boxes_coco2014_val_80.jsonl --rule rule.json --answer-list qa90_gpt4_answer.jsonl answers.jsonl \
    --output reviews.jsonl

A line of `--context` has `image`, `captions` and `instances`, each with `category` and `bbox`. The files are
upstream's, from `llava/eval/table/` and `playground/data/coco2014_val_qa_eval/`. The same command again asks for what
is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.scoring.reviews import add_options, by_image, read_requests, refuse_inputs, write_reviews
from llava.runtime.program import run_program

MODEL = "gpt-4-0314"


def captions_and_boxes(row: dict[str, Any]) -> str:
    """What the reviewer is told about an image: captions, then a line for each box."""
    boxes = [f"{instance['category']}: {instance['bbox']}" for instance in row["instances"]]
    return "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--model`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_gpt_review_visual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, MODEL, context="captions and boxes of the images, JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the file of reviews.

    Raises:
        FlagError, BadSampleError: see `read_requests` and `write_reviews`.
    """
    args = build_parser().parse_args(argv)
    refuse_inputs(args)
    return write_reviews(args, read_requests(args, by_image(args.context, captions_and_boxes)))


if __name__ == "__main__":
    run_program(main)
