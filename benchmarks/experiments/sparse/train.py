"""Train with or without predictors, and with what the comparison needs besides; all flags are those of `llava.train`.

    python -m benchmarks.experiments.sparse.train --judge random --read-from 1 --dynamic True --vision_keep_rate 0.2 ...

Rows without image are left out, as in `llava/train/train_sparse.py`. `--judge random` trains the model while chance
keeps its image tokens: each with the probability of the keep rate, drawn anew in every pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.sparse.rules import NAME, Chance, LateReading, follow
from llava.errors import FlagError
from llava.runtime.program import run_program
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import Parts, parse_args
from llava.train.train import train as train_as_said

JUDGES = ("predictor", "random")


def build_parser() -> argparse.ArgumentParser:
    """The options beside those of `llava/train/train.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", choices=JUDGES, default="predictor", help="what judges image tokens")
    parser.add_argument("--read-from", type=int, default=0, help="text does not see images below this layer")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Train; an output folder that holds checkpoints is resumed. Returns the output folder.

    Raises:
        LlavaError: a problem with options, data or checkpoints that the user can mend.
    """
    ours, others = build_parser().parse_known_args(argv)
    args = parse_args(others, defaults={"requires_image": True})
    if ours.judge == "random" and NAME not in args.extensions:
        raise FlagError("--judge random: nothing is judged without --dynamic True")

    def trainer(model: Any, **given: Any) -> LLaVATrainer:
        if ours.judge == "random":
            follow(model, Chance(model, args.extensions[NAME]["vision_keep_rate"], args.training.seed))
        if ours.read_from:
            LateReading(model, ours.read_from)
        return LLaVATrainer(model=model, **given)

    return train_as_said(args, parts=Parts(trainer=trainer))


if __name__ == "__main__":
    run_program(main)
