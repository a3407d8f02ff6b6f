"""Tiny models whose weights fit into float16 and whose hidden states do not, as with models trained in bfloat16."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llava.eval.answering.loading import LoadedModel
from tests.golden import golden_dir

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


def overflowing_llava(target: Path) -> Path:
    """A copy of the tiny LLaVA of the golden numbers that overflows in the same way."""
    for name, copy in (("tiny-llava-v1.5", target), ("tiny-clip", target.with_name("tiny-clip"))):
        shutil.copytree(golden_dir("llava") / name, copy)
    found = 0
    for path in target.glob("pytorch_model-*.bin"):
        tensors = torch.load(path, weights_only=True)
        for name in tensors:
            if name.startswith("model.layers.0.mlp."):
                tensors[name] = tensors[name] * FACTOR
                found += 1
        torch.save(tensors, path)
    assert found == 3
    return target


@contextlib.contextmanager
def poisoned(loaded: LoadedModel, tokens: Iterable[int]) -> Iterator[None]:
    """Let every prompt that holds one of `tokens` give logits that are not numbers, and no other prompt."""
    weight = loaded.model.get_input_embeddings().weight
    before = weight.data.clone()
    weight.data[list(tokens)] = float("inf")
    try:
        yield
    finally:
        weight.data.copy_(before)
