"""Merge a LoRA checkpoint into its base (upstream `scripts/merge_lora_weights.py`).

Usage: `python scripts/merge_lora_weights.py --model-path LORA --model-base BASE --save-model-path OUTPUT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.model.full_weights import write_full_weights
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python scripts/merge_lora_weights.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="folder with the LoRA checkpoint")
    parser.add_argument("--model-base", required=True, help="folder or hub id of its base")
    parser.add_argument("--save-model-path", required=True, help="folder to write; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    print(f"written: {write_full_weights(args.model_path, args.save_model_path, args.model_base)}")


if __name__ == "__main__":
    run_program(main)
