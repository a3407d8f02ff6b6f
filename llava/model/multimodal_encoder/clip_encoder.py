"""CLIP vision tower whose features are taken from a hidden layer (upstream `multimodal_encoder/clip_encoder.py`).

Only the blocks up to the selected layer are run; the post-layer norm is never used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.data.images import load_image_processor
from llava.errors import CheckpointError, FlagError
from llava.utils import errors_only

SELECT_FEATURES = ("patch", "cls_patch")


def _read_clip(name_or_path: str, dtype: torch.dtype) -> CLIPVisionModel:
    """The vision part of a CLIP checkpoint."""
    with errors_only():  # a full CLIP checkpoint has a text model too, which it would list key by key
        model, report = CLIPVisionModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise CheckpointError(
            f"{name_or_path}: {len(report['missing_keys'])} weights of the vision tower are missing (first: "
            f"{sorted(report['missing_keys'])[:3]})"
        )
    return model


class CLIPVisionTower(nn.Module):
    """A CLIP image encoder that returns the features of one hidden layer.

    Hidden state 0 is the output of the pre-layer norm, hidden state i that of block i; negative numbers count from
    the end. `patch` drops the class token, `cls_patch` keeps it.

    Args:
        name_or_path: folder or hub id of a CLIP checkpoint (a full CLIP model or its vision part).
        select_layer: hidden state to return (`--mm_vision_select_layer`).
        select_feature: `patch` or `cls_patch` (`--mm_vision_select_feature`).
    """

    def __init__(self, name_or_path: str, select_layer: int, select_feature: str = "patch") -> None:
        super().__init__()
        if select_feature not in SELECT_FEATURES:
            raise FlagError(f"--mm_vision_select_feature is '{select_feature}'; known values: {SELECT_FEATURES}")
        self.vision_tower_name = name_or_path
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.trainable = False
        self.config: CLIPVisionConfig = CLIPVisionConfig.from_pretrained(name_or_path)
        self.vision_tower: CLIPVisionModel | None = None
        self.image_processor: CLIPImageProcessorPil | None = None
        layers = self.config.num_hidden_layers
        self.num_blocks = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= self.num_blocks <= layers:
            raise FlagError(
                f"--mm_vision_select_layer is {select_layer}, but '{name_or_path}' has hidden states 0..{layers}"
            )

    @property
    def is_loaded(self) -> bool:
        """True once the weights are in memory."""
        return self.vision_tower is not None

    def load_model(self, dtype: torch.dtype | None = None) -> None:
        """Read weights and image processor; the weights are frozen until `freeze.py` says otherwise.

        Raises:
            CheckpointError: weights are missing in the folder.
        """
        self.image_processor = load_image_processor(self.vision_tower_name)
        self.vision_tower = _read_clip(self.vision_tower_name, dtype or torch.float32)
        self.vision_tower.requires_grad_(False)
        self.trainable = False

    def load_weights(self, folder: str | Path) -> None:
        """Replace the weights by those of a tower that was saved in a checkpoint, keeping dtype and device.

        Raises:
            CheckpointError: weights are missing in the folder, or the tower there has another shape.
        """
        try:
            self._loaded().load_state_dict(_read_clip(str(folder), self.dtype).state_dict())
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: is not a tower of the shape of '{self.vision_tower_name}'") from error

    def used_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the selected feature depends on: the blocks behind it get no gradient."""
        tower = self._loaded()
        used = [tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[: self.num_blocks]]
        wanted = {id(parameter) for module in used for parameter in module.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in wanted:
                yield name, parameter

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch of pictures.

        Args:
            images: (N, 3, H, W) normalised pixels, any floating dtype.

        Returns:
            (N, P, D_vision) in the dtype of `images`; P + 1 rows with the class token for `cls_patch`.
        """
        tower = self._loaded()
        context = contextlib.nullcontext() if self.trainable else torch.no_grad()
        with context:
            hidden = tower.embeddings(images.to(device=self.device, dtype=self.dtype))  # (N, P + 1, D_vision)
            hidden = tower.pre_layrnorm(hidden)
            for block in tower.encoder.layers[: self.num_blocks]:
                hidden = block(hidden, attention_mask=None)
        features = hidden[:, 1:] if self.select_feature == "patch" else hidden
        return features.to(images.dtype)

    def _loaded(self) -> CLIPVisionModel:
        if self.vision_tower is None:
            raise RuntimeError(f"the vision tower '{self.vision_tower_name}' is not loaded; call load_model() first")
        return self.vision_tower

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._loaded().embeddings.class_embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._loaded().embeddings.class_embedding.device

    @property
    def hidden_size(self) -> int:
        """D_vision."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the picture."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """P: patches of one picture, the class token not counted."""
        return self.num_patches_per_side**2

    @property
    def num_features(self) -> int:
        """Rows that one picture takes in the sequence: P, or P + 1 with the class token."""
        return self.num_patches + (self.select_feature == "cls_patch")
