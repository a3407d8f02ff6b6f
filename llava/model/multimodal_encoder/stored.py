"""A vision tower inside full weights, as `model.vision_tower.vision_tower.*`: where LLaVA-1.6 has its trained towers.

Upstream builds its tower before it reads weights if `unfreeze_mm_vision_tower` is true, so these fill it. Here they are
read wherever they are there; the tower that `mm_vision_tower` names gives the sizes and the image processor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.runtime.partition import assign, full_shape
from llava.runtime.weights.tensors import Entry, check_numbers, read_entries
from llava.runtime.weights.weight_files import named_weights

STORED_PREFIX = "model.vision_tower.vision_tower."
"""Beginning of the names of a tower's weights in full weights."""

POSITION_IDS = "embeddings.position_ids"
"""A buffer that transformers stored until 4.31: the numbers of the positions in order."""


FILE_PREFIX = "vision_model."
"""Beginning of the names of a tower's weights in files of towers, which transformers' networks had until version 5."""


def is_stored_tower(name: str) -> bool:
    """True for the name of a tower's weight in full weights."""
    return name.startswith(STORED_PREFIX)


@dataclass(frozen=True)
class StoredTower:
    """The tower in the full weights of a folder.

    Attributes:
        folder: the folder.
        entries: its weights by their names in the tower's network, as in the files.
    """

    folder: Path
    entries: Mapping[str, Entry]

    def read(self) -> dict[str, Tensor]:
        """The tensors by their names in today's networks, on the CPU; without the numbers of the positions.

        Raises:
            CheckpointError: the positions are numbered in another order, which no tower here does.
        """
        found = read_entries({STORED_PREFIX + name: entry for name, entry in self.entries.items()})
        tensors = {bare_name(name.removeprefix(STORED_PREFIX)): tensor for name, tensor in found.items()}
        positions = tensors.pop(POSITION_IDS, torch.arange(1)).flatten()
        if not torch.equal(positions.double(), torch.arange(len(positions)).double()):
            raise CheckpointError(
                f"{self.folder}: '{POSITION_IDS}' of the vision tower in its weights is not 0, 1, 2, ...; towers here "
                "number the positions in order"
            )
        return tensors

    def equals(self, others: Mapping[str, Entry]) -> bool:
        """Whether other files have the same weights, rounded to the dtype here.

        Args:
            others: of a tower's files, by names that may have another beginning.
        """
        theirs = {bare_name(name): name for name in others}
        mine = self.read()
        for name, tensor in mine.items():
            entry = others.get(theirs.get(name, ""))
            if entry is None or entry.shape != tuple(tensor.shape):
                return False
            if not torch.equal(entry.read(theirs[name]).to(tensor.dtype), tensor):
                return False
        return bool(mine)


def bare_name(name: str) -> str:
    """Name of a weight in its network: without the beginning that transformers gave it until version 5."""
    return name.removeprefix(FILE_PREFIX)


def check_names(folder: Path, tower: str, missing: Collection[str], unknown: Collection[str]) -> None:
    """Refuse a tower in full weights that is of another kind than the one that is named.

    Args:
        folder: of the full weights.
        tower: the one that is named.
        missing: names of weights that a feature depends on and that are not there.
        unknown: names of weights that are there and that the network does not have.

    Raises:
        CheckpointError: there are any.
    """
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: the vision tower in its weights ({STORED_PREFIX}*) is not like '{tower}'; missing: "
            f"{sorted(missing)[:3]}, unknown: {sorted(unknown)[:3]}; 'mm_vision_tower' in config.json must name the "
            "tower that it was trained from"
        )


def check_shape(folder: Path, tower: str, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse a weight in full weights of another shape than in the tower that is named.

    Raises:
        CheckpointError: names both shapes.
    """
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{folder}: '{STORED_PREFIX}{name}' has shape {tuple(found)}, but in the tower '{tower}' it has "
            f"{tuple(expected)}; 'mm_vision_tower' in config.json must name the tower that it was trained from"
        )


def fill(network: nn.Module, stored: StoredTower, used: Collection[str], tower: str) -> None:
    """Put the weights of a tower in full weights into a network, keeping dtype and device.

    Args:
        network: of the kind and shape of the tower that is named.
        stored: its weights.
        used: names in the network of the weights that a feature depends on; the others may be missing.
        tower: the one that is named, for messages.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape, or not of finite numbers; names it. Nothing
            has been changed then.
    """
    tensors, named = stored.read(), dict(network.named_parameters())
    check_names(stored.folder, tower, set(used) - tensors.keys(), tensors.keys() - named.keys())
    for name, tensor in tensors.items():
        check_shape(stored.folder, tower, name, tensor.shape, full_shape(named[name]))
    check_numbers({STORED_PREFIX + name: tensor for name, tensor in tensors.items()}, stored.folder)
    for name, tensor in tensors.items():
        assign(named[name], tensor)


def stored_tower(name: str | Path, cache_dir: str | None = None) -> StoredTower | None:
    """The tower in the full weights of a folder, or of a model on a hub; None if they have none.

    Raises:
        CheckpointError: a file of weights is missing or damaged.
    """
    folder, entries = named_weights(name, cache_dir)
    own = {key.removeprefix(STORED_PREFIX): entry for key, entry in entries.items() if is_stored_tower(key)}
    return StoredTower(folder, own) if own else None
