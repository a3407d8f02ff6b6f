"""CLIP vision tower whose features are taken from a hidden layer (upstream `multimodal_encoder/clip_encoder.py`).

Only the blocks up to the selected layer are run; the post-layer norm is never used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging

from llava.errors import CheckpointError, FlagError

SELECT_FEATURES = ("patch", "cls_patch")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Errors only, while a block runs."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


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
        # Pillow's bicubic filter is what every published LLaVA was trained with; torchvision's differs by up to 1/255.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.vision_tower_name)
        with _quiet_transformers():  # a full CLIP checkpoint has a text model too, which it would list key by key
            self.vision_tower, report = CLIPVisionModel.from_pretrained(
                self.vision_tower_name, dtype=dtype or torch.float32, output_loading_info=True
            )
        if report["missing_keys"]:
            raise CheckpointError(
                f"{self.vision_tower_name}: {len(report['missing_keys'])} weights of the vision tower are missing "
                f"(first: {sorted(report['missing_keys'])[:3]})"
            )
        self.vision_tower.requires_grad_(False)
        self.trainable = False

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
