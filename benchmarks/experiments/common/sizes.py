"""How large a tiny model is and how long it trains: what the recipe of every experiment says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of the untrained base.

    Attributes:
        image: side of the square that the 400 x 100 pixel images are stretched to.
        patch: side of a patch, in pixels of that square.
        width: hidden size of tower and decoder.
        layers: layers of the tower, and of the decoder.
        tower_mlp, mlp: inner width of their MLPs.
        vocabulary: pieces of the tokenizer.
        max_length: longest sequence, in tokens and patches.
    """

    image: int = 96
    patch: int = 8
    width: int = 128
    layers: int = 3
    heads: int = 4
    tower_mlp: int = 512
    mlp: int = 344
    vocabulary: int = 800
    max_length: int = 512


@dataclass(frozen=True)
class Training:
    """One kind of run.

    Attributes:
        rows: training rows, each one image with several turns; one epoch over them.
        batch: rows in an update.
        learning_rate: peak rate, reached after the warm-up and followed by a cosine to zero.
        turns: for each task, the most questions of it in a row.
    """

    rows: int
    batch: int
    learning_rate: float
    turns: Mapping[str, int]
