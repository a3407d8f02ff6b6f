r"""Answer questions without an image by a language model or a LLaVA (upstream `llava/eval/model_qa.py`).

python -m llava.eval.model_qa --model-name lmsys/vicuna-7b-v1.5 --question-file question.jsonl \
    --answers-file answer.jsonl

As in the original, answers are sampled with temperature 0.7 and have up to 1024 tokens; `--temperature 0` is greedy.
The same command again continues an interrupted run. Questions about images: `llava.eval.model_vqa`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.errors import BadSampleError
from llava.eval.answering.answers import Task
from llava.eval.answering.options import add_model_options, add_question_options, add_sampling_options
from llava.eval.answering.questions import Question
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_qa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--model-name", type=str, default="facebook/opt-350m", help="the same as --model-path")
    add_question_options(parser, conv_mode="vicuna_v1")
    add_sampling_options(parser, max_new_tokens=1024)
    parser.set_defaults(model_path=None, temperature=0.7)
    return parser


def make_task(question: Question) -> Task:
    """The question alone.

    Raises:
        BadSampleError: the row has an image, which this program would leave out.
    """
    if question.images:
        raise BadSampleError(f"{question.where}: the row has an image; answer it with `python -m llava.eval.model_vqa`")
    return Task(question.question_id, question.text, question.text, (), question.where)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row or the model is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    args.model_path = args.model_path or args.model_name
    from llava.eval.answering.question_run import answer_question_file

    return answer_question_file(args, make_task)


if __name__ == "__main__":
    run_program(main)
