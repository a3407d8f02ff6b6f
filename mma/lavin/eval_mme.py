r"""LaVIN on MME with the command lines of the original (`eval_mme.py`): answers, then perception and cognition.

python -m mma.eval_mme --ckpt_dir ../data/weights --llm_model 13B --adapter_path ./15-eph-pretrain.pth \
    --temperature 5. --visual_adapter_type router --root_dir_ ../data/mme --max_seq_len 512 --max_batch_size 16

The benchmark's folders are read as they are published. The points are those of `llava.eval.eval_mme`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answering.answers import Task
from llava.eval.eval_mme import TaskScore, score_task, table, totals
from llava.runtime.output import replace_text
from llava.runtime.places import Input
from llava.runtime.program import run_program
from mma.lavin.data.prompts import instruction_prompt
from mma.lavin.eval_options import add_answer_options, add_model_options, add_scienceqa_options
from mma.lavin.scoring.mme import LabelSource, MmeQuestion, read_benchmark, report, rows_of

MAX_NEW_TOKENS = 20
"""Longest answer in the original."""

REPORT_FILE = "mme_eval.txt"


def build_parser() -> argparse.ArgumentParser:
    """The original's options, those that it never reads among them, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.eval_mme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_answer_options(parser)
    add_scienceqa_options(parser)
    for action in parser._actions:
        if action.dest in ("data_root", "caption_file", "split", "prompt_format", "use_caption", "options"):
            action.required, action.help = False, "without effect: for ScienceQA"
    parser.add_argument("--root_dir_", type=Path, default=Path("../data/mme"), help="folder with a folder per subset")
    parser.add_argument(
        "--labels",
        type=LabelSource,
        choices=list(LabelSource),
        default=LabelSource.FILE,
        help="right answers: those of the files; or, as the original, yes to the first question and no to the second",
    )
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer; 20 in the original")
    return parser


def tasks_of(questions: Sequence[MmeQuestion]) -> list[Task]:
    """A task for each question."""
    return [
        Task(each.name, prompt, prompt, (each.image,), each.where)
        for each in questions
        for prompt in [instruction_prompt(each.text)]
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, TaskScore]:
    """Run the program.

    Raises:
        LlavaError: a flag, a file, an image or the checkpoint is wrong; the message says what to do.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    from llava.eval.answering.processes import joined
    from mma.lavin.answering import answer_all, generation_options, given_options, output_folder

    given = given_options(build_parser(), words)
    options = generation_options(args, args.max_new_tokens)
    questions, others = read_benchmark(args.root_dir_, args.labels)
    if others:
        print(f"{args.root_dir_}: not a subset, left out: {', '.join(others)}")
    questions = questions[: args.limit and args.limit + args.limit % 2]  # both questions about an image
    folder = output_folder(args, "mme", [Input("--root_dir_", args.root_dir_, has_images=True)])
    with joined() as processes:
        answers = answer_all(args, given, tasks_of(questions), args.root_dir_, folder, options, processes)
        scores = {subset: score_task(rows) for subset, rows in rows_of(questions, answers).items()}
        if processes.is_first:
            print(table(scores))
            print(f"written: {replace_text(folder / REPORT_FILE, report(scores, totals(scores)))}")
    return scores


if __name__ == "__main__":
    run_program(main)
