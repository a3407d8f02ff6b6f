r"""Answer ScienceQA's questions (upstream `llava/eval/model_vqa_science.py`, with batches and continuation).

python -m llava.eval.model_vqa_science --model-path checkpoints/llava-v1.5-7b \
    --question-file scienceqa/llava_test_CQM-A.json --image-folder scienceqa/images/test \
    --answers-file answers.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1

The questions are conversations as `scripts/convert_sqa_to_llava.py` writes them; the first turn is asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import BadSampleError
from llava.eval.answering.answers import Task
from llava.eval.answering.options import add_model_options, add_question_options, add_sampling_options
from llava.eval.answering.questions import field, images_of, read_json
from llava.eval.scoring.mmbench import INSTRUCTIONS
from llava.runtime.program import run_program


def read_tasks(path: str | Path, *, single_pred_prompt: bool = False) -> list[Task]:
    """The questions of a file of conversations.

    The prompt in the answers file shows `<image>` in front where there is an image.

    Args:
        path: JSON list of id, conversations and optionally image.
        single_pred_prompt: append the instruction to answer with a letter.

    Raises:
        BadSampleError: the file or a row is broken.
    """
    instruction = f"\n{INSTRUCTIONS['en']}" if single_pred_prompt else ""
    tasks = []
    for number, row in enumerate(read_json(path, list), start=1):
        where = f"{path}: entry {number}"
        turns = field(row, "conversations", (list,), where)
        if not turns:
            raise BadSampleError(f"{where}: the conversation has no turn")
        text = field(turns[0], "value", (str,), where).replace(DEFAULT_IMAGE_TOKEN, "").strip() + instruction
        images = images_of(row, where)
        shown = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if images else text
        tasks.append(Task(field(row, "id", (str, int), where), text, shown, images, where))
    return tasks


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_vqa_science",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_question_options(parser, conv_mode="llava_v0", question_file="tables/question.json")
    add_sampling_options(parser, max_new_tokens=1024)
    parser.add_argument("--answer-prompter", action="store_true", help="accepted; has no effect, as upstream")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter of an option")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    from llava.data.images import load_image
    from llava.eval.answering.question_run import answer_questions

    tasks = read_tasks(args.question_file, single_pred_prompt=args.single_pred_prompt)
    return answer_questions(args, tasks, lambda name, where: load_image(args.image_folder, name, row=where))


if __name__ == "__main__":
    run_program(main)
