"""ScienceQA's problems as conversations (`convert_to_llava`) or instructions (`convert_to_jsonl`); upstream's script.

Usage: `python scripts/convert_sqa_to_llava.py convert_to_llava --base-dir scienceqa --split train --prompt-format
QCM-LEA`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.scoring import sqa_to_llava
from llava.runtime.program import run_program

COMMANDS = {
    "convert_to_llava": (sqa_to_llava.convert_to_llava, "QCM-LEA", "write llava_<split>_<format>.json: conversations"),
    "convert_to_jsonl": (sqa_to_llava.convert_to_jsonl, "QCM-LEPA", "write scienceqa_<split>_<format>.jsonl"),
}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python scripts/convert_sqa_to_llava.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, default, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--base-dir", "--base_dir", required=True, help="folder of problems.json, pid_splits.json")
        command.add_argument("--split", required=True, help="train, val, test, ... of pid_splits.json")
        command.add_argument("--prompt-format", "--prompt_format", default=default, help="codes of input and output")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    COMMANDS[args.command][0](args.base_dir, args.split, args.prompt_format)


if __name__ == "__main__":
    run_program(main)
