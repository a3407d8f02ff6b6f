"""Training with memory-efficient attention (upstream `train_mem.py`): FlashAttention 2 where it can run, else SDPA.

The attention in use is printed; everything else is `llava/train/train.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.runtime.program import run_program
from llava.train.arguments import parse_args
from llava.train.train import preferred_attention, train


def main(argv: Sequence[str] | None = None) -> Path:
    """Train as the command line says, with the attention that it names or else the preferred one; see `train.main`."""
    args = parse_args(argv)
    attention = args.model.attn_implementation or preferred_attention()
    print(f"attention: {attention}")
    return train(args, attention)


if __name__ == "__main__":
    run_program(main)
