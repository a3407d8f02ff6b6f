"""Convert adapters of the original text HydraLoRA to PEFT folders, and back (`tuner/original.py`).

    python -m hydralora.convert from-original ORIGINAL_ADAPTER OUR_ADAPTER
    python -m hydralora.convert to-original OUR_ADAPTER ORIGINAL_ADAPTER

The LLaVA checkpoints of MLLM-HydraLoRA are read and written in place, see `original.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hydralora.tuner.original import export_adapter, import_adapter
from llava.errors import LlavaError
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m hydralora.convert", description="Convert adapters of the original text HydraLoRA."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("from-original", "write an adapter of the original (adapter_model.bin) as a PEFT folder"),
        ("to-original", "write a HydraLoRA adapter of PEFT in the original's layout"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
        command.add_argument("source", type=Path, help="folder to read")
        command.add_argument("target", type=Path, help="folder to create")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; a folder that cannot be converted ends it with a message and status 1."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "from-original":
            config = import_adapter(args.source, args.target)
            print(
                f"{args.target}: {config.lora_nums} experts of rank {config.r}; load it with PeftModel.from_pretrained"
            )
        else:
            export_adapter(args.source, args.target)
            print(f"{args.target}: written for the original's PEFT")
    except (ValueError, LlavaError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
