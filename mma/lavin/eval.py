r"""LaVIN on ScienceQA with the command lines of the original (`eval.py`): answers, then accuracies by group.

python -m mma.eval --ckpt_dir ../data/weights --llm_model 7B --adapter_path ./LaVIN-7B --data_root ../data \
    --caption_file ../data/captions.json --split test --max_seq_len 512 --max_batch_size 64

Several processes share the questions (`torchrun --nproc_per_node 8 -m mma.eval ...`); rerun the command to resume.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import FlagError
from llava.eval.answering.answers import Task
from llava.runtime.output import replace_text
from llava.runtime.places import Input
from llava.runtime.program import run_program
from mma.lavin.eval_options import add_answer_options, add_model_options, add_scienceqa_options
from mma.lavin.scoring.scienceqa import ScienceQAScore, score

if TYPE_CHECKING:
    from mma.lavin.data.scienceqa import ScienceQA

MAX_NEW_TOKENS = 64
"""Longest answer in the original."""


def build_parser() -> argparse.ArgumentParser:
    """The original's options and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_scienceqa_options(parser)
    add_answer_options(parser)
    parser.add_argument(
        "--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer in tokens; 64 in the original"
    )
    parser.add_argument(
        "--random_fallback",
        action="store_true",
        help="draw a choice (by --seed) where an answer names none, as the original does; default: it is wrong",
    )
    return parser


def tasks_of(data: ScienceQA, prompt_format: str, options: Sequence[str]) -> list[Task]:
    """A task for each problem of a split.

    Raises:
        BadSampleError: a problem is malformed.
    """
    tasks = []
    for number, name in enumerate(data.ids):
        prompt, _ = data.prompt_and_answer(number, prompt_format, options)
        image = data.image(number)
        tasks.append(Task(name, prompt, prompt, () if image is None else (image,), data.where(number)))
    return tasks


def write_scores(found: ScienceQAScore, folder: Path) -> None:
    """Write what the original writes, and the counts behind it."""
    predictions = replace_text(folder / "preds.json", json.dumps(found.predictions, indent=2) + "\n")
    scores = replace_text(folder / "scores.json", json.dumps(found.to_dict(), indent=2) + "\n")
    replace_text(folder / "scores.txt", f"{found}\n")
    print(f"written: {predictions}, {scores}")


def main(argv: Sequence[str] | None = None) -> ScienceQAScore:
    """Run the program.

    Raises:
        LlavaError: a flag, a file, an image or the checkpoint is wrong; the message says what to do.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    from llava.eval.answering.processes import joined
    from mma.lavin.answering import answer_all, generation_options, given_options, output_folder
    from mma.lavin.data.scienceqa import check_prompt_format, read_split

    given = given_options(build_parser(), words)
    options = generation_options(args, args.max_new_tokens)
    check_prompt_format(args.prompt_format)
    if args.use_caption and args.caption_file is None:
        raise FlagError("--use_caption: say where the captions are by --caption_file")
    data = read_split(args.data_root, args.split, args.caption_file if args.use_caption else None)
    tasks = tasks_of(data, args.prompt_format, args.options)[: args.limit]
    images, root = Input("the images", data.image_folder, has_images=True), Input("--data_root", args.data_root)
    folder = output_folder(args, f"scienceqa-{args.split}", [images], [root])
    with joined() as processes:
        answers = answer_all(args, given, tasks, data.image_folder, folder, options, processes)
        found = score(
            answers,
            {name: data.problem(number) for number, name in enumerate(data.ids)},
            asked=[str(task.question_id) for task in tasks],
            options=args.options,
            fallback=random.Random(args.seed) if args.random_fallback else None,
        )
        if processes.is_first:
            print(found)
            write_scores(found, folder)
    return found


if __name__ == "__main__":
    run_program(main)
