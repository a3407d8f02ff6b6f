"""Towers that transformers reads: what CLIP and SigLIP share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava.errors import CheckpointError
from llava.model.formats import check_weight_files
from llava.model.multimodal_encoder.base import TowerShape, VisionTower
from llava.utils import errors_only


class TransformersTower(VisionTower):
    """A vision model of transformers with `embeddings` and `encoder.layers`.

    Attributes:
        config_class, model_class, processor_class: of transformers.
        class_token: True if the model has one.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[Any]]
    class_token: ClassVar[bool]

    def read_shape(self) -> TowerShape:
        """Sizes from `config.json`; of a full model's, its vision part."""
        self.config = self.config_class.from_pretrained(self.vision_tower_name)
        return TowerShape(
            self.config.num_hidden_layers,
            self.config.hidden_size,
            self.config.image_size,
            self.config.patch_size,
            self.class_token,
        )

    def read_image_processor(self) -> Any:
        """The processor of `preprocessor_config.json`; torchvision's resizing differs from the original's."""
        return self.processor_class.from_pretrained(self.vision_tower_name)

    def optional_weights(self, network: Any) -> Sequence[nn.Module]:
        """Parts that no feature depends on and that a checkpoint may lack."""
        return ()

    def read_network(self, source: str, dtype: torch.dtype) -> nn.Module:
        """The vision part of a checkpoint.

        Raises:
            CheckpointError: weights are missing.
        """
        check_weight_files(source)
        with errors_only():  # a full model has a text model too, which transformers would list key by key
            model, report = self.model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
        optional = {id(weight) for part in self.optional_weights(model) for weight in part.parameters()}
        optional_names = {name for name, weight in model.named_parameters() if id(weight) in optional}
        missing = set(report["missing_keys"]) - optional_names
        if missing:
            raise CheckpointError(
                f"{source}: {len(missing)} weights of the vision tower are missing (first: {sorted(missing)[:3]})"
            )
        return model

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        """The encoder layers."""
        return network.encoder.layers

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One encoder layer; every patch sees every other."""
        return block(hidden, attention_mask=None)

    def save(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write the folder as transformers does."""
        self.loaded().save_pretrained(folder, state_dict=tensors)
        self.image_processor.save_pretrained(folder)
