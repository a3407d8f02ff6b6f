"""LaVIN's demo under its original name: `torchrun --nproc_per_node 1 demo.py --server_name 127.0.0.1`."""

from llava.runtime.program import run_program
from mma.lavin.demo import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
