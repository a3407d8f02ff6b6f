"""Base weights of LaVIN in the layout of transformers.

python -m mma.weights --llama_model_path ../data/weights --llm_model 7B --out ./checkpoints/llama-7b

Reads Meta's `consolidated.*.pth` with `params.json`, and with `--use_vicuna` the folder `vicuna_<llm_model>` beside it:
full weights, or the difference to LLaMA. Training and evaluation call this by themselves where it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.errors import FlagError
from llava.runtime.program import run_program
from mma.lavin.weights.choices import AUTO, VICUNA_CHOICES, VICUNA_HELP


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama_model_path", type=str, default="./llama", help="folder with 7B/, vicuna_7B/, ...")
    parser.add_argument("--llm_model", type=str, default="7B", help="name of the folder of the LLaMA weights")
    parser.add_argument("--use_vicuna", action="store_true", help="write Vicuna, from vicuna_<llm_model>")
    parser.add_argument("--vicuna_weights", choices=VICUNA_CHOICES, default=AUTO, help=VICUNA_HELP)
    parser.add_argument("--out", type=Path, default=None, help="folder to write; default: <name>-hf beside the files")
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="largest file of weights")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        The folder that can be loaded.

    Raises:
        CheckpointError: see `mma.lavin.weights.base.convert`.
        FlagError: `--vicuna_weights` without `--use_vicuna`.
    """
    args = build_parser().parse_args(argv)
    if args.vicuna_weights != AUTO and not args.use_vicuna:
        raise FlagError(f"--vicuna_weights {args.vicuna_weights}: needs --use_vicuna")
    from mma.lavin.weights.base import BaseWeights, convert, ready_folder

    wanted = BaseWeights(args.llama_model_path, args.llm_model, args.use_vicuna, args.vicuna_weights, args.out)
    ready = ready_folder(wanted)
    if ready is None:
        ready = convert(wanted, args.max_shard_size)
        print(f"written: {ready}")
    else:
        print(f"{ready}: is in the layout of transformers already; nothing to write")
    print(f"next: python -m mma.train --llama_model_path {ready} --output_dir OUTPUT")
    return ready


if __name__ == "__main__":
    run_program(main)
