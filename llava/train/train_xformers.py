"""Training with memory-efficient attention on GPUs without FlashAttention (upstream `train_xformers.py`).

Upstream replaces Llama's attention by that of xformers; torch's SDPA is memory-efficient too, and works for every
backbone. The same as `llava/train/train_mem.py`, but FlashAttention 2 is used only if `--attn_implementation` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.runtime.program import run_program
from llava.train.arguments import parse_args
from llava.train.train import train

ATTENTION = "sdpa"


def main(argv: Sequence[str] | None = None) -> Path:
    """Train as the command line says, with the attention that it names or else SDPA; see `train.main`."""
    args = parse_args(argv)
    attention = args.model.attn_implementation or ATTENTION
    print(f"attention: {attention}")
    return train(args, attention)


if __name__ == "__main__":
    run_program(main)
