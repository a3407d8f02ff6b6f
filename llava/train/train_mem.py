"""Training with memory-efficient attention (upstream `train_mem.py`): FlashAttention 2 where it can run, else SDPA.

The attention in use is printed; everything else is `llava/train/train.py`.
"""

from __future__ import annotations

from llava.train.train import main, preferred_attention

if __name__ == "__main__":
    attention = preferred_attention()
    print(f"attention: {attention}")
    main(attn_implementation=attention)
