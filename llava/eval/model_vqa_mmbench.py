r"""Answer MMBench's questions (upstream `llava/eval/model_vqa_mmbench.py`, with batches and continuation).

python -m llava.eval.model_vqa_mmbench --model-path checkpoints/llava-v1.5-7b \
    --question-file mmbench/mmbench_dev_20230712.tsv --answers-file answers.jsonl --single-pred-prompt \
    --temperature 0 --conv-mode vicuna_v1

The images are in the question file. `--lang cn` asks for the letter in Chinese.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answering.options import add_model_options, add_question_options, add_sampling_options
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours; `--image-folder` has no effect, as upstream."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_vqa_mmbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_question_options(parser)
    add_sampling_options(parser, max_new_tokens=1024)
    parser.add_argument("--all-rounds", action="store_true", help="ask once for every order of the options' circle")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter of an option")
    parser.add_argument("--lang", type=str, default="en", help="language of that request: en or cn")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    from llava.eval.answering.question_run import answer_questions
    from llava.eval.scoring.mmbench import open_image, read_tasks, to_row

    tasks = read_tasks(
        args.question_file, all_rounds=args.all_rounds, single_pred_prompt=args.single_pred_prompt, lang=args.lang
    )
    return answer_questions(args, tasks, open_image, to_row=to_row)


if __name__ == "__main__":
    run_program(main)
