"""Reading the tower that a configuration names, and making sure that it is the one that was meant.

A tower that is named by a path may have been replaced there, or may have moved along with the checkpoint; where the
configuration has a digest, the first tower with these weights is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llava.errors import FlagError
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import tower_at, vision_tower_places
from llava.model.multimodal_encoder.identity import DIGEST, weights_digest
from llava.model.multimodal_encoder.stored import StoredTower
from llava.runtime.partition import is_split
from llava.runtime.zero import read_whole


def read_tower(
    config: Any,
    near: Iterable[str | Path] = (),
    dtype: torch.dtype | None = None,
    stored: StoredTower | None = None,
    identify: bool = False,
) -> VisionTower:
    """The tower that a LLaVA configuration names, with its weights.

    Args:
        config: of the LLaVA.
        near: folders in whose inside and neighborhood it is looked for.
        dtype: of the weights; None: float32.
        stored: the tower in the full weights of checkpoint or base, which is taken unless the digest tells otherwise.
        identify: compute the digest of the weights although `config` has none to compare it with.

    Raises:
        CheckpointError: it cannot be found or read.
        FlagError: none that was found has the weights that `config` tells of, or the selected layer or feature does not
            exist.
    """
    expected = getattr(config, DIGEST, None)
    places = vision_tower_places(config.mm_vision_tower, near, moved=expected is not None)
    others: dict[str, str] = {}
    choices = [(place, inside) for inside in ([None] if stored is None else [stored, None]) for place in places]
    for place, inside in choices if expected is not None else [(places[0], stored)]:
        tower = tower_at(place, config)
        with torch.random.fork_rng(devices=[]):  # ZeRO-3 builds modules for real and would draw for each
            if expected is None and not identify:
                tower.load_model(dtype, inside)
                return tower
            tower.load_model(torch.float32, inside)  # the digest is of unrounded weights
            tower.digest = _digest(tower)
        if expected in (None, tower.digest):
            return tower if dtype is None else tower.to(dtype)
        others[str(inside.folder) if inside is not None else place] = str(tower.digest)
    found = ", ".join(f"{place} has {digest[:16]}..." for place, digest in others.items())
    raise FlagError(  # of a setting, which the caller knows the file of
        f"'mm_vision_tower' is {config.mm_vision_tower}, whose weights had the SHA-256 {str(expected)[:16]}... in "
        f"training ('{DIGEST}'), but {found}; put the tower of then in its place, or delete '{DIGEST}' to use another"
    )


def _digest(tower: VisionTower) -> str:
    network = tower.loaded()
    if any(is_split(weight) for weight in network.parameters()):
        with read_whole():
            if tower.stored is None:
                network = tower.read_network(tower.vision_tower_name, torch.float32)
            else:
                network = tower.read_stored(tower.stored, torch.float32)
    return weights_digest(network, tower.optional_weights(network))
