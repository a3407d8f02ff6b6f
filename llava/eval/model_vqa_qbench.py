r"""Answer Q-Bench's questions (upstream `llava/eval/model_vqa_qbench.py`, with batches and continuation).

python -m llava.eval.model_vqa_qbench --model-path checkpoints/llava-v1.5-7b \
    --questions-file qbench/llvisionqa_dev.json --image-folder qbench/images_llvisionqa/ \
    --answers-file qbench/llvisionqa_dev_answers.jsonl --conv-mode llava_v1 --lang en

The answers file has the rows of the question file with a `response`. Upstream writes them without line feeds, loads the
model in 8 bits and crops the images; here the model is loaded and its images are prepared as everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.errors import FlagError
from llava.eval.answering.answers import Row, Task
from llava.eval.answering.options import add_model_options, add_question_options, add_sampling_options
from llava.eval.answering.questions import field, read_json
from llava.runtime.program import run_program

# The second is upstream's text: a backslash stands where a line feed was meant.
REQUESTS = {"en": "\nChoose between one of the options as follows:\n", "zh": "\\在下列选项中选择一个:\n"}
LETTERS = "ABCD"


def read_tasks(path: str | Path, *, lang: str = "en") -> list[Task]:
    """The questions of a file.

    Args:
        path: JSON list of img_path, question and candidates.
        lang: language of the request to choose, `en` or `zh`.

    Raises:
        BadSampleError: the file or a row is broken.
        FlagError: unknown language.
    """
    if lang not in REQUESTS:
        raise FlagError(f"--lang {lang}: must be one of {', '.join(REQUESTS)}")
    tasks = []
    for number, row in enumerate(read_json(path, list), start=1):
        where = f"{path}: entry {number}"
        question = field(row, "question", (str,), where)
        candidates = field(row, "candidates", (list,), where)
        options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, candidates, strict=False))
        prompt = question + REQUESTS[lang] + options
        tasks.append(Task(number, prompt, prompt, (field(row, "img_path", (str,), where),), where, row))
    return tasks


def to_row(task: Task, text: str, model_id: str) -> Row:
    """The row of the question file with the answer."""
    return {**task.extra, "response": text}


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_vqa_qbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_question_options(parser)
    parser.add_argument("--questions-file", dest="question_file", help="upstream's spelling of --question-file")
    add_sampling_options(parser, max_new_tokens=1024)
    parser.add_argument("--lang", type=str, default="en", help="language of the request to choose: en or zh")
    parser.set_defaults(
        model_path="llava-v1.5",
        image_folder="./playground/data/qbench/images_llvisionqa",
        question_file="./playground/data/qbench/llvisionqa_dev.json",
        temperature=0.0,
    )
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

    return answer_questions(
        args,
        read_tasks(args.question_file, lang=args.lang),
        lambda name, where: load_image(args.image_folder, name, row=where),
        to_row=to_row,
    )


if __name__ == "__main__":
    run_program(main)
