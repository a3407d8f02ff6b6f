"""Plan a training command before it is launched: peak memory by part, largest batch, operations and host waits.

    python -m llava.train.plan --gpus 8 THE TRAINING COMMAND

One update is run with tensors that have shapes and no numbers, so no weights are read and no GPU is needed. What is
counted, and how far it can be trusted: docs/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.runtime.program import run_program
from llava.train.plan.parser import build_parser

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, show and write.

    Raises:
        LlavaError: as the training program, for what is wrong with options and configurations; or the plan does not
            support what they ask for.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    build_parser().parse_known_args(words)  # --help and a mistyped value, before anything large is imported
    from llava.train.plan.command import read_command
    from llava.train.plan.plan import make_plan
    from llava.train.plan.report import show, write

    plan = make_plan(read_command(words))
    show(plan)
    write(plan)


if __name__ == "__main__":
    run_program(main)
