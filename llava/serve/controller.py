"""Upstream's controller of workers: says that `llava.serve.api` replaces it, and ends with status 2.

Each server answers at its own address, batches its requests and tells clients to come back when it is full, so nothing
has to distribute them. Several models are several servers, and the page asks all of them (docs/serving.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from llava.runtime.program import run_program
from llava.serve.replaced import PAGE, SERVER, end


def build_parser() -> argparse.ArgumentParser:
    """Upstream's options."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.controller",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="localhost", help="has no effect")
    parser.add_argument("--port", type=int, default=21001, help="has no effect")
    parser.add_argument("--dispatch-method", default="shortest_queue", help="has no effect")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Say what replaces this program.

    Raises:
        SystemExit: always, with status 2.
    """
    message = (
        f"No controller is needed: start a server for each model, and give clients their addresses:\n"
        f"  {SERVER} --model-path CHECKPOINT --port 8000\n"
        f"  {PAGE} --server http://127.0.0.1:8000"
    )
    end(build_parser(), argv, lambda _: message)


if __name__ == "__main__":
    run_program(main)
