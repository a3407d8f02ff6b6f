"""The options of the programs on long answers (upstream `dynamic_eval/model_lvis_*`); `long_answers.py` carries out.

Nothing here needs torch, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse

from llava.eval.answering.options import TEMPLATE_HELP, Fallback, add_model_options

SINGLE_PREDICTION = "Answer with the option's letter from the given choices directly."


def build_parser(prog: str, description: str, *, generates: bool) -> argparse.ArgumentParser:
    """The original options with their defaults, and ours.

    Args:
        prog: what a user types to start it.
        description: what the program says of itself.
        generates: add `--max-new-tokens`.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--image-folder", type=str, default="", help="folder that image names are relative to")
    parser.add_argument("--question-file", type=str, default="tables/question.json", help="conversations, a JSON list")
    parser.add_argument("--answers-file", type=str, default="answer.jsonl", help="JSON lines, one conversation each")
    parser.add_argument("--conv-mode", type=str, default=Fallback("llava_v0"), help=f"{TEMPLATE_HELP}, llava_v0")
    parser.add_argument("--num-chunks", type=int, default=1, help="cut the conversations into this many chunks ...")
    parser.add_argument("--chunk-idx", type=int, default=0, help="... and measure only this one, counted from 0")
    parser.add_argument("--temperature", type=float, default=0.2, help="without effect, as upstream: always greedy")
    if generates:
        parser.add_argument("--max-new-tokens", type=int, default=1024, help="limit on the tokens of one answer")
    parser.add_argument("--answer-prompter", action="store_true", help="without effect, as upstream")
    parser.add_argument("--single-pred-prompt", action="store_true", help=f'add "{SINGLE_PREDICTION}" to each question')
    parser.add_argument("--restart", action="store_true", help="replace existing results instead of continuing them")
    return parser
