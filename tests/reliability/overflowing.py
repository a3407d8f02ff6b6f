"""Tiny models whose weights fit into float16 and whose hidden states do not, as with models trained in bfloat16."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

FACTOR = 1e3


def overflow_in_float16(folder: Path, target: Path) -> Path:
    """A copy of a causal language model whose first MLP gives values beyond 65504; in float32 they are numbers."""
    shutil.copytree(folder, target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.data *= FACTOR
        assert linear.weight.abs().max() < torch.finfo(torch.float16).max
    model.save_pretrained(target)
    return target
