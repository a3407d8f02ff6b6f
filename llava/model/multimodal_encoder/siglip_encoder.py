"""SigLIP vision tower: no class token, no norm before the blocks, and a pooling head that is not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llava.model.multimodal_encoder.transformers_tower import TransformersTower


class SiglipVisionTower(TransformersTower):
    """The image encoder of a SigLIP checkpoint: a full SigLIP model or its vision part."""

    config_class = SiglipVisionConfig
    model_class = SiglipVisionModel
    processor_class = SiglipImageProcessorPil
    class_token = False

    def optional_weights(self, network: Any) -> Sequence[nn.Module]:
        """The pooling head."""
        return [network.head] if network.use_head else []

    def embedding_modules(self, network: Any) -> Sequence[nn.Module]:
        """Patch and position embeddings."""
        return [network.embeddings]

    def embed(self, network: Any, images: Tensor) -> Tensor:
        """(N, P, D_vision) of (N, 3, height, width)."""
        return network.embeddings(images)
