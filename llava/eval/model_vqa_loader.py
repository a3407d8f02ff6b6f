r"""Answer a file of questions (upstream `llava/eval/model_vqa_loader.py`, with batches and continuation).

python -m llava.eval.model_vqa_loader --model-path checkpoints/llava-v1.5-7b --question-file questions.jsonl \
    --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1 --batch-size 16

A question is a JSON line with `question_id`, `text` and, unless it is about text only, `image`. The same command again
continues an interrupted run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answering.answers import Task
from llava.eval.answering.options import add_model_options, add_question_options, add_sampling_options
from llava.eval.answering.questions import Question
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_vqa_loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_question_options(parser)
    add_sampling_options(parser, max_new_tokens=128)
    return parser


def make_task(question: Question) -> Task:
    """The prompt in the answers file is the raw question."""
    return Task(question.question_id, question.text, question.text, question.images, question.where)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    from llava.eval.answering.question_run import answer_question_file

    return answer_question_file(args, make_task)


if __name__ == "__main__":
    run_program(main)
