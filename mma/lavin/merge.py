"""Merging adapters into a model for one modality: full weights that run as fast as the unadapted model.

python -m mma.merge ./checkpoints/lavin-7b ./checkpoints/lavin-7b-image --modality image

The output is a complete checkpoint. It answers samples of that modality alone and refuses others; with `--plain` that
check is left out too, and a folder remains that programs without this package read. Routed adapters of the vision
tower depend on each token and stay beside the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.constants import DTYPES
from llava.runtime.program import run_program
from mma.config import MODALITIES


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of a training run with --mma True")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--modality", choices=MODALITIES, default="image", help="of the samples that it will answer")
    parser.add_argument("--model-base", help="base of the checkpoint, where it is not the recorded one")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the weights that are written")
    parser.add_argument("--plain", action="store_true", help="write a folder that needs this package no more")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    from llava.model.stored_dtype import DTYPES as TORCH_DTYPES
    from mma.lavin.merging import merge_checkpoint

    written = merge_checkpoint(
        args.checkpoint, args.output, args.modality, args.model_base, TORCH_DTYPES[args.dtype], args.plain
    )
    print(f"written: {written}, for samples of {args.modality} alone")
    print(f"next: python -m llava.eval.run_llava --model-path {written} --image-file IMAGE --query QUESTION")


if __name__ == "__main__":
    run_program(main)
