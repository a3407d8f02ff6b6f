"""The optimizer's part of a checkpoint under FSDP2: one file, whole and by names, for any number of processes.

transformers would write a second copy of all weights next to it, and a folder that only as many processes can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers.trainer import OPTIMIZER_NAME

from llava.errors import CheckpointError
from llava.runtime.files import reading
from llava.runtime.weights.torch_files import load_plain

STATE, GROUPS = "state", "param_groups"
"""Keys of the file, as of every state of an optimizer; a parameter is called by its name in the model."""


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, write: bool) -> None:
    """Write `optimizer.pt`; all processes call this.

    Args:
        model: whose parameters are optimised.
        optimizer: torch's own, not what wraps it.
        folder: exists.
        write: True on the process that writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)  # empty on the other processes
    if write:
        torch.save(state, folder / OPTIMIZER_NAME)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read `optimizer.pt`, of which every process keeps its part.

    Args:
        model: whose parameters are optimised.
        optimizer: torch's own; changed.
        folder: of the checkpoint.

    Raises:
        CheckpointError: the file is damaged, or of a run that trained other parameters.
    """
    path = folder / OPTIMIZER_NAME
    state: Any = load_plain(path)
    if not isinstance(state, dict) or not {STATE, GROUPS} <= state.keys() or not isinstance(state[STATE], dict):
        raise CheckpointError(f"{path}: is not the state of an optimizer")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    lacking, unknown = sorted(trained - state[STATE].keys()), sorted(state[STATE].keys() - trained)
    if lacking or unknown:
        raise CheckpointError(
            f"{path}: was written by a run that trained other parameters, or without --fsdp; {len(lacking)} have no "
            f"state (first: {lacking[:3]}), {len(unknown)} are not trained here (first: {unknown[:3]})"
        )
    with reading(path, "does not fit this run"):
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
