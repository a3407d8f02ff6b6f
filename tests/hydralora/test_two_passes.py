"""Two forward passes begin before a backward pass does: with checkpointing the gradients are those without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hydralora.config import RoutedMLPConfig
from hydralora.patch import patch_llava
from tests.checkpointed import checkpoint_layers
from tests.dynamic.sparse_models import sparse_llava
from tests.hydralora.tuner.models import IDS, MASK, tiny_llama
from tests.llava.model.test_precision import routed_llava

LABELS = torch.where(MASK.bool(), IDS, -100)
TEXT = ({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, {"input_ids": IDS[:2, :4], "labels": IDS[:2, :4]})


def patched_llama() -> Any:
    """A model of transformers with routed blocks and their balance loss."""
    model = tiny_llama()
    torch.manual_seed(1)
    for block in patch_llava(model, RoutedMLPConfig(experts=3, rank=4)).blocks.values():
        block.reset_parameters(identity=False)
    return model


def with_images(ids: list[int]) -> dict[str, Any]:
    rows = torch.tensor([ids])
    labels = rows.masked_fill(rows < 0, -100)
    labels[:, :3] = -100
    return {"input_ids": rows, "labels": labels, "images": torch.linspace(-1, 1, 2352).reshape(1, 3, 28, 28)}


IMAGES = (with_images([1, 350, -200, 400, 500, 13, 77, 81]), with_images([1, -200, 7, 8, 9]))
MODELS: dict[str, tuple[Callable[[], Any], tuple[dict[str, Any], dict[str, Any]]]] = {
    "patched": (patched_llama, TEXT),
    "routed": (routed_llava, IMAGES),
    "sparse": (sparse_llava, IMAGES),
}


def gradients(model: Any, batches: tuple[dict[str, Any], ...]) -> list[dict[str, Tensor]]:
    """Of each batch; the forward passes have all begun before the first backward pass."""
    torch.manual_seed(0)
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    found = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        trained = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append({name: gradient.clone() for name, gradient in trained.items()})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_recomputation_does_not_see_a_later_pass(name: str) -> None:
    make, batches = MODELS[name]
    plain, spared = (make().train().requires_grad_(True) for _ in range(2))
    checkpoint_layers(spared)
    expected, found = (gradients(model, batches) for model in (plain, spared))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    for one, other in zip(expected, found, strict=True):
        close(other, one)
    added = [key for key in expected[0] if any(word in key for word in ("router", "predictor"))]
    assert added, "nothing that was added is trained: the test would say nothing"
    assert any(expected[0][key].any() for key in added)
