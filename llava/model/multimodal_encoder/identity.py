"""Which tower it is: a name that resolves from any working directory, and a digest of its weights.

A checkpoint that does not carry its tower records both, so that another tower in the same place is noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from llava.model.formats import TOWER_FOLDER
from llava.model.multimodal_encoder import open_clip_encoder
from llava.model.multimodal_encoder.stored import bare_name
from llava.runtime.files import read_json

DIGEST = "mm_vision_tower_sha256"
"""Key in `config.json`: digest of the weights of the tower that `mm_vision_tower` names outside of the folder."""

TRAINED_FROM = "mm_vision_tower_from"
"""Key in `config.json`: the tower that a trained one was at first."""


def weights_digest(network: nn.Module, left_out: Iterable[nn.Module] = ()) -> str:
    """SHA-256 of the weights of a tower in fp32, whatever files, dtype and version of transformers they came from.

    Args:
        network: of a tower, as it was read.
        left_out: parts that checkpoints may lack.
    """
    optional = {id(weight) for part in left_out for weight in part.parameters()}
    named = {bare_name(name): weight for name, weight in network.named_parameters()}
    digest = hashlib.sha256()
    for name, weight in sorted(named.items()):
        if id(weight) in optional:
            continue
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy())
    return digest.hexdigest()


def lasting_name(name: str) -> str:
    """The name of a tower as it resolves from any working directory: of a path the absolute one, else as it is.

    Args:
        name: as `resolve_vision_tower` gives it.
    """
    if name.startswith(open_clip_encoder.PREFIX):
        parts = open_clip_encoder.parse_name(name)
        if not parts.is_file:
            return name
        return f"{open_clip_encoder.PREFIX}{parts.architecture}/{os.path.abspath(parts.pretrained)}"
    return os.path.abspath(name) if Path(name).exists() else name


def is_carried(name: str) -> bool:
    """True for the tower inside a checkpoint folder, which is that checkpoint's own and is published nowhere else.

    Args:
        name: as `resolve_vision_tower` gives it.
    """
    path = Path(name)
    config = path.parent / "config.json"
    return path.name == TOWER_FOLDER and config.is_file() and read_json(config).get("mm_vision_tower") == TOWER_FOLDER
