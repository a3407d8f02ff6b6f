"""Parameters that DeepSpeed ZeRO-3 has split over the processes: their real size, and access to the whole of them.

A split parameter looks empty (shape 0) outside of a forward pass. Every function here works on whole parameters too,
so callers need not know which kind they hold. What gathers is collective: all processes call it with the same list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


def is_split(parameter: nn.Parameter) -> bool:
    """True if ZeRO-3 has taken the parameter over."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return parameter.ds_shape if is_split(parameter) else parameter.shape


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Gather split parameters for the length of a block.

    Args:
        parameters: of any kind.
        modify: what process 0 writes into them is kept and sent to all others; without it, changes are lost.
    """
    split = [parameter for parameter in parameters if is_split(parameter)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if modify else None):
        yield


def fetch(parameters: Mapping[str, nn.Parameter], keep: bool = True) -> dict[str, Tensor]:
    """The whole of each parameter, in the precision in which it is optimised.

    Under DeepSpeed with bf16 or fp16 these are the optimizer's fp32 values, not the rounded ones of the forward pass.

    Args:
        parameters: by name; the same on all processes.
        keep: False on processes that only take part in gathering; they get an empty dict.

    Returns:
        Copies on the CPU of what had to be gathered; other parameters as they are, detached, without a copy.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        master = _master(parameter)
        if master is not None:
            value = master.detach().cpu() if keep else master
        elif is_split(parameter):
            with whole([parameter]):
                value = parameter.detach().to("cpu", copy=True) if keep else parameter
        else:
            value = parameter.detach()
        if keep:
            tensors[name] = value
    return tensors


def _master(parameter: nn.Parameter) -> Tensor | None:
    """The fp32 value that DeepSpeed's optimizer holds; None outside of DeepSpeed and for frozen parameters."""
    if not parameter.requires_grad or not (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)
