"""Upstream's worker for one model: says which command of `llava.serve.api` replaces it, and ends with status 2.

The command has the options of this one that have a meaning there: checkpoint, base, device, quantization, host, port.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from llava.runtime.program import run_program
from llava.serve.replaced import end, server_command

OTHERS = ("worker-address", "controller-address", "model-name", "limit-model-concurrency", "stream-interval")
FLAGS = ("multi-modal", "no-register", "use-flash-attn")


def build_parser() -> argparse.ArgumentParser:
    """Upstream's options."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.model_worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", default="CHECKPOINT", help="checkpoint folder")
    parser.add_argument("--model-base", default=None, help="base model of an adapter or projector checkpoint")
    parser.add_argument("--device", default=None, help="cuda, cuda:1, cpu, ...")
    parser.add_argument("--host", default=None, help="address to listen on")
    parser.add_argument("--port", type=int, default=None, help="port to listen on")
    parser.add_argument("--load-8bit", action="store_true", help="quantise the weights to 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="quantise the weights to 4 bits")
    for name in OTHERS:
        parser.add_argument(f"--{name}", default=None, help="has no effect")
    for name in FLAGS:
        parser.add_argument(f"--{name}", action="store_true", help="has no effect")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Say what replaces this program.

    Raises:
        SystemExit: always, with status 2.
    """
    end(
        build_parser(),
        argv,
        lambda args: f"The server of a model is one program, without a controller:\n  {server_command(args)}",
    )


if __name__ == "__main__":
    run_program(main)
