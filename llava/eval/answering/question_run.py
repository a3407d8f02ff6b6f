"""From tasks to a finished answers file, for the `model_vqa*` programs and `llava.eval` (upstream `model_vqa*.py`).

`options.py` has the options that come in here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.data.images import load_image
from llava.eval.answering.answers import (
    AnswersFile,
    Task,
    ToRow,
    answer_row,
    refuse_foreign_answers,
    refuse_other_settings,
    shapes_of,
)
from llava.eval.answering.conv_mode import conv_mode_of_questions
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import choose_device, choose_dtype, load_model
from llava.eval.answering.options import chosen, json_values, refuse_input_as_answers, sampling_options
from llava.eval.answering.questions import Question, read_questions
from llava.eval.answering.runner import OpenImage, Speed, answer_tasks
from llava.inference_options import given_options, put_on, watched
from llava.runtime.hub import get_model_name_from_path
from llava.runtime.weights.fingerprint import weights_fingerprint


def answer_question_file(args: argparse.Namespace, to_task: Callable[[Question], Task]) -> Path:
    """Answer the chunk of `--question-file` that is asked for, with images of `--image-folder`.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    tasks = [to_task(question) for question in read_questions(args.question_file)]
    return answer_questions(args, tasks, lambda name, where: load_image(args.image_folder, name, row=where))


def answer_questions(
    args: argparse.Namespace, tasks: Sequence[Task], open_image: OpenImage, *, to_row: ToRow = answer_row
) -> Path:
    """Write the answers file of a program: of `tasks`, those that `--limit` and the chunk options choose.

    Args:
        args: the options of `options.py`.
        tasks: all that could be answered, in file order.
        open_image: opens one image of a task.
        to_row: makes the row of an answer.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    answers, speed = answer_and_measure(args, chosen(tasks, args), open_image, to_row=to_row)
    print(f"{answers.path}: {len(answers.rows)} answers" + (f"; {speed}" if speed else ", all from earlier runs"))
    return answers.path


def answer_and_measure(
    args: argparse.Namespace,
    tasks: Sequence[Task],
    open_image: OpenImage,
    *,
    to_row: ToRow = answer_row,
    whole: Path | None = None,
) -> tuple[AnswersFile, Speed | None]:
    """Answer exactly `tasks`; whatever can be wrong without the model is checked before it is loaded.

    Errors as `answer_questions`.

    Args:
        args: the options of `options.py`.
        tasks: what is asked.
        open_image: opens one image of a task.
        to_row: makes the row of an answer.
        whole: the answers file that this one is a part of; it must not hold answers made with other settings.

    Returns:
        the finished answers file, and how fast it went; None if there was nothing left to ask.
    """
    speed = None
    refuse_input_as_answers(args, args.answers_file if whole is None else whole)
    options = sampling_options(args)
    options.check_batch_size(args.batch_size)
    name = get_model_name_from_path(args.model_path)
    conv_mode = conv_mode_of_questions(args.conv_mode, args.model_path)
    settings = answer_settings(args, options, conv_mode)
    if whole is not None:
        refuse_foreign_answers(whole)
        if not args.restart:
            refuse_other_settings(whole, settings, shapes_of(tasks, to_row))
    answers = AnswersFile(
        args.answers_file,
        tasks,
        model_id=name,
        settings=settings,
        arguments=json_values(args),
        to_row=to_row,
        restart=args.restart,
    )
    print(f"{args.answers_file}: {len(answers.rows)} of {len(tasks)} questions are answered")
    if answers.pending:
        loaded = load_model(args.model_path, args.model_base, device=args.device, torch_dtype=args.torch_dtype)
        with watched(put_on(loaded, args), args) as words:
            speed = answer_tasks(
                answers,
                loaded,
                open_image,
                options,
                conv_mode=conv_mode,
                batch_size=args.batch_size,
                workers=args.num_workers,
            )
        print(*words(), sep="\n", end="\n" if words() else "")
    answers.finish()
    return answers, speed


def answer_settings(args: argparse.Namespace, options: GenerationOptions, conv_mode: str) -> dict[str, object]:
    """All that decides the answer to a given question; a run is continued only with the same settings.

    The batch size is not among them, and weights count by their content, not by the name of their folder.
    """
    return {
        "weights": weights_fingerprint(args.model_path) or args.model_path,
        "base_weights": weights_fingerprint(args.model_base) or args.model_base,
        "torch_dtype": str(choose_dtype(args.torch_dtype, choose_device(args.device))),
        "conv_mode": conv_mode,
        **vars(options),
        **given_options(args),
    }
