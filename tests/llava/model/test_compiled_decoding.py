"""Decoding under `torch.compile`: one graph for each further token, without a break, whatever extension is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tests.dynamic.rules.example_rules  # noqa: F401  # two more rules
from dynamic.rules import reduced
from llava.eval.answering.loading import load_model
from llava.runtime.cache_name import cache_of
from tests.golden import golden_dir
from tests.mma.adapted_models import adapted_llava

BASE = golden_dir("llava") / "tiny-llava-v1.5"
ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
STEPS = 8


def dense() -> tuple[Any, Any]:
    return load_model(str(BASE), device="cpu").model, None


def hydralora() -> tuple[Any, Any]:
    return load_model(str(ROUTED), str(BASE), device="cpu").model, None


def mma() -> tuple[Any, Any]:
    return adapted_llava(), None


def rule() -> tuple[Any, Any]:
    model = load_model(str(BASE), device="cpu").model
    return model, reduced(model, "example-last-row:0.5@1,2")


@pytest.mark.parametrize("make", [dense, hydralora, mma, rule])
@torch.no_grad()
def test_a_compiled_step_gives_the_same_tokens(make: Callable[[], tuple[Any, Any]]) -> None:
    """The second token makes it a graph for any number of stored tokens; then that serves all."""
    model, extensions = make()
    side = model.get_vision_tower().image_size
    ids, images = torch.tensor([[5, -200, 7, 8], [9, 4, -200, 6]]), torch.randn(2, 3, side, side)
    graphs = CompileCounterWithBackend("eager")

    def step(token: Tensor, mask: Tensor, cache: Any) -> Tensor:
        positions = (mask.cumsum(1) - 1)[:, -1:]
        output = model(input_ids=token, attention_mask=mask, position_ids=positions, cache=cache, extensions=extensions)
        return output.logits[:, -1:].argmax(-1)

    def answer(step: Any) -> tuple[Tensor, list[int]]:
        output = model(input_ids=ids, images=images, use_cache=True, extensions=extensions)
        cache, tokens, seen = cache_of(output), [output.logits[:, -1:].argmax(-1)], []
        mask = torch.ones(2, cache.get_seq_length(), dtype=torch.bool)
        if extensions is not None:
            cache.reserve(STEPS)
        for _ in range(STEPS):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], dim=1)
            tokens.append(step(tokens[-1], mask, cache))
            seen.append(graphs.frame_count)
        return torch.cat(tokens, dim=1), seen

    expected, _ = answer(step)
    torch._dynamo.reset()
    found, seen = answer(torch.compile(step, backend=graphs, fullgraph=True))
    assert torch.equal(found, expected)
    assert 0 < seen[-1] == seen[1] <= 2
