"""Rewrite a LLaVA's full weights in today's layout (upstream `llava/model/consolidate.py`).

Usage: `python -m llava.model.consolidate --src FOLDER --dst FOLDER`. Shards, `.bin` files and configurations of older
versions become one consistent folder of safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.errors import CheckpointError
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m llava.model.consolidate", description=__doc__.splitlines()[0])
    parser.add_argument("--src", required=True, help="folder with full weights of a LLaVA")
    parser.add_argument("--dst", required=True, help="folder to write; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        CheckpointError: `--src` holds no full weights, or `--dst` exists.
    """
    args = build_parser().parse_args(argv)
    from llava.model.formats import inspect_checkpoint
    from llava.model.full_weights import write_full_weights

    if inspect_checkpoint(args.src).needs_base:
        raise CheckpointError(f"{args.src}: holds no full weights; merge it with scripts/merge_lora_weights.py")
    print(f"written: {write_full_weights(args.src, args.dst)}")


if __name__ == "__main__":
    run_program(main)
