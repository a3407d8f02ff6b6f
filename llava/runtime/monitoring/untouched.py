"""Measuring a model in the middle of its training without changing what comes after.

Random states, the mode of every module and the settings of the cache are what they were, so that a run with evaluations
makes the same updates, bit for bit, as a run without.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random states of Python, NumPy and torch, all GPUs included, back after a block."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode, and leave no trace of it.

    Layers that are recomputed in training are not in this mode, and no dropout draws.

    Args:
        model: with whatever is wrapped around it. Each module gets its own mode back: a frozen tower may be in another
            one than the rest.
    """
    modes = {module: module.training for module in model.modules()}
    configs = {id(config): config for module in modes if (config := getattr(module, "config", None)) is not None}
    caches = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    with random_states_kept():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for config, used in caches:
                config.use_cache = used
