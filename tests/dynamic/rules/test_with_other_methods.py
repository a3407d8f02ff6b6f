"""Rules on models with adapters of every method, and on quantized ones: a row is what it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tests.dynamic.rules.example_rules  # noqa: F401  # two more rules
from dynamic.rules import attach, reduced
from llava.eval.answering.loading import load_model
from tests.golden import golden_dir
from tests.mma.adapted_models import adapted_llava

BASE = golden_dir("llava") / "tiny-llava-v1.5"
ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
PLANS = ("fastv:0.5@1", "pyramiddrop:0.5@1,2", "visionzip:0.75+dart:0.5@2", "divprune:0.5", "sparsevlm:0.5@1,2")
"""Rules that look into layers of the decoder, of the tower, and at features."""


def lora() -> Any:
    """A PEFT model with LoRA of a size that matters, not merged."""
    model = load_model(str(BASE), device="cpu").model
    options = LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*\.layers\.\d+\.self_attn\.(q|k|v)_proj", init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(model, options).eval()


def hydralora() -> Any:
    return load_model(str(ROUTED), str(BASE), device="cpu").model


def four_bits() -> Any:
    pytest.importorskip("bitsandbytes")
    return load_model(str(BASE), device="cpu", load_4bit=True).model


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [lora, hydralora, adapted_llava, four_bits])
def test_a_row_is_what_it_is_alone(make: Callable[[], Any], plan: str) -> None:
    model = make()
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    side, generator = bare.get_vision_tower().image_size, torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, side, side, generator=generator).to(bare.dtype)
    rows = [torch.tensor([5, -200, 7, 8, 9, 11]), torch.tensor([9, 4, -200, 6]), torch.tensor([3, 21, 14])]
    ids = torch.stack([torch.cat([row.new_zeros(6 - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(6) >= 6 - len(row) for row in rows]).long()

    def logits(chosen: list[int], **options: Any) -> Tensor:
        output = model.generate(
            ids[chosen], images=images[chosen], attention_mask=mask[chosen], extensions=reduced(model, plan),
            max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
            **options,
        )  # fmt: skip
        return torch.stack(output.logits, dim=1)

    together = logits([0, 1, 2])
    near = {"rtol": 1e-4, "atol": 1e-4 if bare.dtype == torch.float32 else 3e-2}
    torch.testing.assert_close(logits([0, 1, 2], use_cache=False), together, **near)
    for row in range(3):
        torch.testing.assert_close(logits([row]), together[row : row + 1], **near)
    dense = model.generate(
        ids, images=images, attention_mask=mask, max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]  # fmt: skip
    assert float((dense[:2] - together[:2, 0]).abs().max()) > 10 * near["atol"], "the rule matters"
    torch.testing.assert_close(dense[2:], together[2:, 0], **near)


def test_a_handle_works_through_a_peft_model() -> None:
    model = lora()
    image = torch.zeros(1, 3, *[model.get_base_model().get_vision_tower().image_size] * 2)
    with attach(model, "grid", 2) as handle:
        assert [item.extension.name for item in model.get_base_model().extensions] == ["reduction"]
        model.generate(torch.tensor([[5, -200, 7]]), images=image, max_new_tokens=2)
        handle.remove()
        assert len(model.get_base_model().extensions) == 0
