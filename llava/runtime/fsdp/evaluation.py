"""A pass without gradient leaves groups of parameters whole under FSDP2; optimizer and checkpoint expect them split."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def split_again(model: nn.Module) -> None:
    """Split every group of parameters that is whole; nothing for a model that FSDP2 has not split."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
