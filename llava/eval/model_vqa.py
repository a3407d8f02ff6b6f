r"""Answer a file of questions with long answers (upstream `llava/eval/model_vqa.py`, with batches and continuation).

python -m llava.eval.model_vqa --model-path checkpoints/llava-v1.5-7b --question-file questions.jsonl \
    --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1

The same as `llava.eval.model_vqa_loader`, but an answer may have 1024 tokens unless `--max_new_tokens` says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answering.options import add_model_options, add_question_options, add_sampling_options
from llava.eval.model_vqa_loader import make_task
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_vqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_question_options(parser)
    add_sampling_options(parser, max_new_tokens=1024)
    return parser


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
