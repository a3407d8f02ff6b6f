"""Write a LLaVA as its difference from the base (upstream `llava/model/make_delta.py`).

Usage: `python -m llava.model.make_delta --base-model-path BASE --target-model-path LLAVA --delta-path OUTPUT`.
"""

from __future__ import annotations

import argparse
import operator
from collections.abc import Sequence
from pathlib import Path

from llava.errors import FlagError
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m llava.model.make_delta", description=__doc__.splitlines()[0])
    parser.add_argument("--base-model-path", required=True, help="folder of the language model it was made from")
    parser.add_argument("--target-model-path", required=True, help="folder of the LLaVA, full weights")
    parser.add_argument("--delta-path", required=True, help="folder to write; must not exist")
    parser.add_argument("--hub-repo-id", help="not carried out: upload the folder with the hub's own program")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        FlagError: `--hub-repo-id` is given.
    """
    args = build_parser().parse_args(argv)
    if args.hub_repo_id is not None:
        raise FlagError(
            f"--hub-repo-id: nothing is uploaded here; run `hf upload {args.hub_repo_id} {args.delta_path}`"
        )
    from llava.model.delta import combine

    output = combine(
        Path(args.base_model_path), Path(args.target_model_path), Path(args.delta_path), operation=operator.sub
    )
    print(f"written: {output}")


if __name__ == "__main__":
    run_program(main)
