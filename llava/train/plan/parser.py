"""The options of the plan itself; imports the standard library alone, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Options of the plan itself; all others belong to the training command."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.plan",
        usage="%(prog)s [--gpus N] [--gpu_memory GIB] [--length N] [--record FILE.json] TRAINING COMMAND",
        description="Plan a training run without its weights and without a GPU: peak memory per GPU by part, the "
        "largest batch that fits, floating-point operations and host waits of an update. One update is run with "
        "tensors that have shapes and no numbers.",
        epilog="The training command is its options alone, or all of it: launcher, program, options. Of a script: "
        'LAUNCHER="python -m llava.train.plan --gpus 8" bash scripts/v1_5/finetune.sh. docs/performance.md says what '
        "is counted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, help="processes of the run, one for each GPU (default: the launcher's, or 1)"
    )
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GiB of a GPU (default %(default)g)")
    parser.add_argument("--length", type=int, help="positions of every row (default: --model_max_length)")
    parser.add_argument("--record", type=Path, help="write the numbers into this JSON file")
    return parser
