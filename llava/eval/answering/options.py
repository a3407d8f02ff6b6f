"""The options that the programs which ask a model share, and what can be said of them before a model is imported.

Nothing here needs torch, so that `--help` and a mistyped option are answered at once. `question_run.py` carries out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DTYPES
from llava.eval.answering.answers import Task, settings_path
from llava.eval.answering.questions import MissingChunkError, get_chunk
from llava.inference_options import add_inference_options
from llava.runtime.places import Input, refuse_file
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, check_ranges

if TYPE_CHECKING:
    from llava.eval.answering.generation import GenerationOptions

TEMPLATE_HELP = "conversation template; default: that of the model's training, or where its folder does not say"

RUN_RANGES = {"limit": COUNT, "num_workers": NOT_NEGATIVE, "batch_size": COUNT, "num_chunks": COUNT}
"""What the numbers of `add_chunk_options` and `add_run_options` may be; those of decoding know it themselves."""


class Fallback(str):
    """The default of `--conv-mode` in a program: the template of models that do not say how they were trained.

    It is the name of the template; its class tells it from one that was asked for.
    """

    def __str__(self) -> Fallback:
        """Itself: argparse calls an option's `type`, here `str`, on its default as well."""
        return self


def batch_size(text: str) -> int | None:
    """The value of `--batch-size`: a number, or None for `auto`."""
    return None if text == "auto" else int(text)


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """`--model-path` and `--model-base` as upstream, our `--device` and `--torch-dtype`, and what packages add."""
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
    add_inference_options(parser)


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
    parser.add_argument("--conv-mode", type=str, default=Fallback(conv_mode), help=f"{TEMPLATE_HELP}, {conv_mode}")
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
    from llava.eval.answering.generation import GenerationOptions

    return GenerationOptions(args.temperature, args.top_p, args.num_beams, args.max_new_tokens, args.seed)


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
