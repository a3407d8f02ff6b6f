"""What the `model_vqa*` programs share: their common options, and the way from tasks to a finished answers file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.data.images import load_image
from llava.eval.answering.answers import (
    AnswersFile,
    Task,
    ToRow,
    answer_row,
    refuse_foreign_answers,
    refuse_other_settings,
    settings_path,
    shapes_of,
)
from llava.eval.answering.conv_mode import HELP, Fallback, conv_mode_of_questions
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import DTYPES, choose_device, choose_dtype, load_model
from llava.eval.answering.questions import MissingChunkError, Question, get_chunk, read_questions
from llava.eval.answering.runner import OpenImage, Speed, answer_tasks
from llava.runtime.hub import get_model_name_from_path
from llava.runtime.places import Input, refuse_file
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, check_ranges
from llava.runtime.weights.fingerprint import weights_fingerprint

RUN_RANGES = {"limit": COUNT, "num_workers": NOT_NEGATIVE, "batch_size": COUNT, "num_chunks": COUNT}
"""What the numbers of `add_chunk_options` and `add_run_options` may be; those of decoding know it themselves."""


def batch_size(text: str) -> int | None:
    """The value of `--batch-size`: a number, or None for `auto`."""
    return None if text == "auto" else int(text)


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """`--model-path` and `--model-base` as upstream, and our `--device` and `--torch-dtype`."""
    default = None if required else "facebook/opt-350m"
    parser.add_argument("--model-path", type=str, default=default, required=required, help="checkpoint folder")
    parser.add_argument("--model-base", type=str, default=None, help="base model of an adapter or projector checkpoint")
    parser.add_argument("--device", type=str, default=None, help="cuda, cuda:1, cpu, ...; default: cuda if available")
    parser.add_argument(
        "--torch-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype of the weights; auto: float16 on a GPU, float32 on a CPU",
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int | None = None) -> None:
    """The decoding options of the original programs and `--seed`; without a limit, the caller fills it in."""
    parser.add_argument("--temperature", type=float, default=0.2, help="0: greedy decoding; above 0: sampling")
    parser.add_argument(
        "--top_p", type=float, default=None, help="sample from the most probable tokens up to this mass"
    )
    parser.add_argument("--num_beams", type=int, default=1, help="beams of beam search; 1: none")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="limit on the tokens of an answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling; has no effect with --temperature 0")


def add_question_options(
    parser: argparse.ArgumentParser, *, conv_mode: str = "llava_v1", question_file: str = "tables/question.jsonl"
) -> None:
    """Files, template and chunks as upstream, and our options of a run."""
    parser.add_argument("--image-folder", type=str, default="", help="folder that image names are relative to")
    parser.add_argument("--question-file", type=str, default=question_file, help="the questions")
    parser.add_argument(
        "--answers-file", type=str, default="answer.jsonl", help="JSON lines, one answer each; continued"
    )
    parser.add_argument("--conv-mode", type=str, default=Fallback(conv_mode), help=f"{HELP}, {conv_mode}")
    add_chunk_options(parser)
    add_run_options(parser)


def add_chunk_options(parser: argparse.ArgumentParser) -> None:
    """`--num-chunks` and `--chunk-idx` as upstream, and what becomes of chunks that are too many."""
    parser.add_argument("--num-chunks", type=int, default=1, help="cut the questions into this many chunks ...")
    parser.add_argument("--chunk-idx", type=int, default=0, help="... and answer only this one, counted from 0")
    parser.add_argument(
        "--allow-empty-chunk", action="store_true", help="more chunks than questions: an empty file, not an error"
    )


def add_run_options(parser: argparse.ArgumentParser, *, default_batch_size: str = "1") -> None:
    """What is ours in every program that answers questions."""
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=default_batch_size,
        help="questions answered together, no effect on the answers; auto: many, and fewer when memory runs out",
    )
    parser.add_argument("--limit", type=int, default=None, help="answer only this many questions, the first ones")
    parser.add_argument("--num-workers", type=int, default=4, help="threads that read images")
    parser.add_argument("--restart", action="store_true", help="replace existing answers instead of continuing them")


def json_values(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON values, paths as texts."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def sampling_options(args: argparse.Namespace) -> GenerationOptions:
    """The values of `add_sampling_options`.

    Raises:
        FlagError: a value is out of range.
    """
    return GenerationOptions(args.temperature, args.top_p, args.num_beams, args.max_new_tokens, args.seed)


def answer_question_file(args: argparse.Namespace, to_task: Callable[[Question], Task]) -> Path:
    """Answer the chunk of `--question-file` that is asked for, with images of `--image-folder`.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    tasks = [to_task(question) for question in read_questions(args.question_file)]
    return answer_questions(args, tasks, lambda name, where: load_image(args.image_folder, name, row=where))


RESULT_ENDINGS = (".result.json", ".samples.jsonl")
"""Of the files that `llava.eval` writes next to the answers."""


def refuse_input_as_answers(args: argparse.Namespace, path: str | Path, flag: str = "--answers-file") -> None:
    """Raise if answers, or what is written next to them, would fall on something that the program reads.

    Args:
        args: options of a program; those that name inputs are found by their names.
        path: the answers file.
        flag: option that names it.

    Raises:
        FlagError: it does; or the path is empty or a directory.
    """
    names = ("question_file", "image_folder", "model_path", "model_base", "data_dir")
    inputs = [Input(f"--{name.replace('_', '-')}", getattr(args, name, None)) for name in names]
    refuse_file(flag, path, inputs)
    answers = Path(path)
    also = [settings_path(answers), *(answers.with_name(f"{answers.stem}{ending}") for ending in RESULT_ENDINGS)]
    refuse_file(flag, path, inputs, also=also)


def chosen(tasks: Sequence[Task], args: argparse.Namespace) -> Sequence[Task]:
    """The tasks of this run: the first `--limit`, of these the chunk that is asked for.

    Raises:
        FlagError: a number is out of range, or there is no such chunk.
    """
    check_ranges(args, RUN_RANGES, dashes=True)
    try:
        return get_chunk(tasks[: args.limit], args.num_chunks, args.chunk_idx)
    except MissingChunkError as error:
        if not args.allow_empty_chunk:
            raise
        print(f"nothing to do: {error}")
        return []


def answer_questions(
    args: argparse.Namespace, tasks: Sequence[Task], open_image: OpenImage, *, to_row: ToRow = answer_row
) -> Path:
    """Write the answers file of a program: of `tasks`, those that `--limit` and the chunk options choose.

    Args:
        args: the options of the functions above.
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
        args: the options of the functions above.
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
        speed = answer_tasks(
            answers,
            load_model(args.model_path, args.model_base, device=args.device, torch_dtype=args.torch_dtype),
            open_image,
            options,
            conv_mode=conv_mode,
            batch_size=args.batch_size,
            workers=args.num_workers,
        )
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
    }
