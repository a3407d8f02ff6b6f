"""Parameters that DeepSpeed ZeRO-3 or FSDP2 has split over the processes: their real size, and access to the whole.

A parameter that ZeRO-3 has split looks empty (shape 0) outside of a forward pass; one of FSDP2 is a DTensor. Every
function here works on whole parameters too, so callers need not know which kind they hold. What gathers is collective:
all processes call it with the same list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def _by_zero(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def is_split(parameter: Tensor) -> bool:
    """True if ZeRO-3 or FSDP2 has taken the parameter over."""
    return _by_zero(parameter) or isinstance(parameter, DTensor)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return parameter.ds_shape if _by_zero(parameter) else parameter.shape


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or of a state of the optimizer, detached."""
    held: Tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return held.to_local() if isinstance(held, DTensor) else held


def share(tensor: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor that all processes hold, split as `like`; its dtype and device."""
    placed = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def shared_like(tensors: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """This process's parts of tensors that all processes hold, if any of `parameters` is split by FSDP2."""
    like = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    if like is None:
        return dict(tensors)
    return {
        name: distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def assign(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Copy a tensor that all processes hold into a parameter, keeping its dtype and device.

    Not through `.data`: whoever keeps what follows from parameters sees a change by their version.
    """
    if isinstance(parameter, DTensor):
        parameter.copy_(share(tensor, parameter))
        return
    with whole([parameter], modify=True):
        parameter.copy_(tensor.to(device=parameter.device, dtype=parameter.dtype))


@torch.no_grad()
def rows_of(parameter: nn.Parameter, rows: Sequence[int]) -> Tensor:
    """Copies of some rows of a parameter: (n, ...)."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()[list(rows)].clone()
    with whole([parameter]):
        return parameter.detach()[list(rows)].clone()


@torch.no_grad()
def assign_rows(parameter: nn.Parameter, rows: Mapping[int, Tensor]) -> None:
    """Copy tensors that all processes hold into some rows of a parameter."""
    if isinstance(parameter, DTensor):
        table = parameter.detach().full_tensor()
        for row, tensor in rows.items():
            table[row] = tensor.to(table)
        parameter.copy_(share(table, parameter))
        return
    with whole([parameter], modify=True):
        for row, tensor in rows.items():
            parameter[row] = tensor.to(parameter)


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Gather what ZeRO-3 has split for the length of a block.

    Args:
        parameters: of any kind; FSDP2 offers nothing of the sort, see `fetch`, `assign` and `assign_rows`.
        modify: what process 0 writes into them is kept and sent to all others; without it, changes are lost.
    """
    split = [parameter for parameter in parameters if _by_zero(parameter)]
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
        elif isinstance(parameter, DTensor):
            gathered = parameter.detach().full_tensor()
            value = gathered.cpu() if keep else gathered
        elif _by_zero(parameter):
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
