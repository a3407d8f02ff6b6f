"""CLIP vision tower (upstream `multimodal_encoder/clip_encoder.py`); hidden state 0 is the pre-layer norm's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.model.multimodal_encoder.transformers_tower import TransformersTower


class CLIPVisionTower(TransformersTower):
    """The image encoder of a CLIP checkpoint: a full CLIP model or its vision part."""

    config_class = CLIPVisionConfig
    model_class = CLIPVisionModel
    processor_class = CLIPImageProcessorPil
    class_token = True

    def embedding_modules(self, network: Any) -> Sequence[nn.Module]:
        """Patch, class and position embeddings, and the norm behind them."""
        return [network.embeddings, network.pre_layrnorm]

    def embed(self, network: Any, images: Tensor) -> Tensor:
        """(N, P + 1, D_vision) of (N, 3, height, width)."""
        return network.pre_layrnorm(network.embeddings(images))
