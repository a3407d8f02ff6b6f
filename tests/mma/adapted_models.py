"""Tiny models with adapters of a size at which they, and the modality, matter."""

from __future__ import annotations

from typing import Any

import torch

from llava.model.builder import load_pretrained_model
from mma.config import MmaConfig
from mma.extension import MmaExtension
from mma.layer import RepAdapter, RoutedRepAdapter
from mma.model import EMBEDDING
from tests.golden import golden_dir

BASE = golden_dir("llava") / "tiny-llava-v1.5"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Logits are as large as 10; sums in another order move them by up to 2.5e-5 (measured)."""
BLOCK = MmaConfig(adapter_type="block", visual_adapter_type="router", temperature=2.0)


def shake(model: Any, seed: int = 7) -> Any:
    """Give every adapter random up-projections, and routers that tell the modalities apart."""
    generator = torch.Generator().manual_seed(seed)

    def draw(weight: torch.Tensor, scale: float) -> None:
        weight.copy_(scale * torch.randn(weight.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RepAdapter):
                for weight in (*module.conv_A.parameters(), *module.conv_B.parameters()):
                    draw(weight, 0.4)
            if isinstance(module, RoutedRepAdapter):
                for weight in module.conv_D.parameters():
                    draw(weight, 0.4)
                for weight in module.expert_weights.parameters():
                    draw(weight, 0.6)
        embedding = getattr(model.get_decoder(), EMBEDDING, None)
        if embedding is not None:
            draw(embedding.weight, 1.0)
    return model


def attach_adapters(model: Any, config: MmaConfig = BLOCK) -> Any:
    """Attach adapters and shake them."""
    model.extensions.attach(model, MmaExtension(), config.to_dict())
    return shake(model).eval().requires_grad_(False)


def adapted_llava(config: MmaConfig = BLOCK, **options: Any) -> Any:
    """The tiny LLaVA checkpoint with adapters; `options` of `load_pretrained_model`."""
    return attach_adapters(load_pretrained_model(str(BASE), device="cpu", **options)[1], config)
