r"""METEOR of generated answers, all turns on one cache (upstream `dynamic_eval/model_lvis_multi_round_for_meteor.py`).

python -m llava.dynamic_eval.model_lvis_multi_round_for_meteor --model-path results/dynamic-llava-7b \
    --question-file lvis.json --image-folder images --answers-file results.jsonl --conv-mode vicuna_v1

Works on dense models too; see `llava/eval/long_answers.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answering import long_options
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    name = "python -m llava.dynamic_eval.model_lvis_multi_round_for_meteor"
    return long_options.build_parser(name, str(__doc__), generates=True)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; see `long_answers.main`."""
    args = build_parser().parse_args(argv)
    from llava.eval import long_answers

    return long_answers.main(args, "meteor", multi_round=True)


if __name__ == "__main__":
    run_program(main)
