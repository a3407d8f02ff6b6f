"""What a checkpoint says of its vision tower: that it carries it, or where it is, with a digest of the weights."""

from __future__ import annotations

from typing import Any

import torch

from llava.model.formats import TOWER_FOLDER
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.identity import is_carried, lasting_name


def is_own(tower: VisionTower | None) -> bool:
    """True for a tower that full weights have to carry: nothing but a checkpoint has its weights."""
    return tower is not None and (is_carried(tower.vision_tower_name) or tower.is_from_elsewhere())


def record_carried(config: Any, tower: VisionTower) -> None:
    """Write into the configuration of a checkpoint that its folder has the tower.

    Args:
        config: changed in place.
        tower: the one that is written along.
    """
    if not is_carried(tower.vision_tower_name):
        config.mm_vision_tower_from = lasting_name(tower.vision_tower_name)
    config.mm_vision_tower, config.mm_vision_tower_sha256 = TOWER_FOLDER, None


def record_named(config: Any, tower: VisionTower | None, alone: bool) -> None:
    """Write into the configuration of a checkpoint where its tower is; a model without one keeps what its base says.

    Args:
        config: changed in place.
        tower: as it was read.
        alone: the checkpoint needs no base. Weights that a base has rounded are not found in the place that is named.
    """
    if tower is not None:
        config.mm_vision_tower = lasting_name(tower.vision_tower_name)
        digest = tower.digest or getattr(config, "mm_vision_tower_sha256", None)
        rounded = tower.stored is not None and any(
            each.dtype != torch.float32 for each in tower.stored.entries.values()
        )
        config.mm_vision_tower_sha256 = None if alone and rounded else digest
