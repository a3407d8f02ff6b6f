"""Buffers that older programs stored with the weights although they follow from the configuration.

They are not read. They are compared with the model's own, because another value means another model than the
configuration describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.runtime.weights.tensors import Entry

FREQUENCIES = "rotary_emb.inv_freq"
"""Of rotary embeddings: a buffer of each layer until transformers 4.31, of the whole decoder now."""

TOLERANCE = 0.01
"""Relative; bfloat16 rounds by 0.004."""


def is_derived(name: str) -> bool:
    """True for the name of a stored buffer that follows from the configuration."""
    return name.endswith(FREQUENCIES)


def check_frequencies(cls: Any, config: Any, entries: Mapping[str, Entry], difference: bool = False) -> None:
    """`check_derived` for a program that works on files, without a model.

    Args:
        cls: class of the model.
        config: its configuration.
        entries: of the files, by name.
        difference: the files may be the difference of two models, whose frequencies are zero.

    Raises:
        CheckpointError: see `check_derived`.
    """
    if any(map(is_derived, entries)):
        with torch.random.fork_rng(devices=[]), init_empty_weights():  # buffers have their values, weights no memory
            model = cls(config)
        check_derived(model, entries, difference)


def check_derived(model: nn.Module, entries: Mapping[str, Entry], difference: bool = False) -> None:
    """Compare stored frequencies with those of the model; a common factor between them is a scaling of the positions.

    Args:
        model: has the buffers that follow from the configuration.
        entries: of the files, by name.
        difference: zeros are accepted, the difference of two models with the same frequencies.

    Raises:
        CheckpointError: they differ; names the file.
    """
    own = [value for name, value in model.named_buffers() if name.endswith("inv_freq") and not value.is_meta]
    seen: set[tuple[float, ...]] = set()
    for name in sorted(filter(is_derived, entries)):
        stored = entries[name].read(name).float().flatten()
        key = tuple(stored.tolist())
        if key in seen or not own:
            continue
        seen.add(key)
        if difference and not any(key):
            continue
        if not any(_same(stored, value.detach().float().cpu()) for value in own):
            raise CheckpointError(
                f"{entries[name].path}: '{name}' says that rotary embeddings have other frequencies than those that "
                "config.json asks for ('rope_theta', 'head_dim'); one of the two is of another model"
            )


def _same(stored: Tensor, own: Tensor) -> bool:
    if stored.shape != own.shape or not bool(torch.isfinite(stored).all()) or float(stored[0]) == 0:
        return False
    large = own > 1e-3 * own[0]  # float16 has few digits for the lowest
    ratio = (stored / stored[0]) / (own / own[0])
    return bool(((ratio - 1).abs() < TOLERANCE)[large].all())
