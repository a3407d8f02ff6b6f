"""Training with memory-efficient attention (upstream `train_mem.py`): FlashAttention 2 where it can run, else SDPA.

The attention in use is printed; everything else is `llava/train/train.py`.
"""

from __future__ import annotations

from functools import partial

from llava.train.train import main, preferred_attention
from llava.utils import run_program

if __name__ == "__main__":
    attention = preferred_attention()
    print(f"attention: {attention}")
    run_program(partial(main, attn_implementation=attention))
