"""DeepSpeed 0.12 on a CPU with gloo, for `in_checkout.py`: it wants Intel's extensions there, which are not installed.

Only what lies under DeepSpeed is replaced: its device, two collective operations that gloo lacks in torch 2.1, and a
helper that it compiles. Its engine, its stages and its checkpoints are its own.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any


def use_cpu() -> None:
    """Make DeepSpeed's device the CPU and its backend gloo, before anything has used it."""
    for name in ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["intel_extension_for_pytorch"].__spec__ = None
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Cpu(CPU_Accelerator):
        def __init__(self) -> None:
            super().__init__()
            self._communication_backend_name = "gloo"

        def device_count(self) -> int:
            return 1

        def create_op_builder(self, class_name: str) -> Any:
            return Flattening() if class_name == "UtilsBuilder" else super().create_op_builder(class_name)

    set_accelerator(Cpu())
    for name in ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"):
        del sys.modules[name]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import AcceleratorState
    from deepspeed import comm

    start = comm.init_distributed
    comm.init_distributed = lambda dist_backend, **options: start(dist_backend="gloo", **options)
    AcceleratorState.use_ipex = False
    replace_collectives()
    keep_towers_in_fp32()
    let_upstream_save()


def let_upstream_save() -> None:
    """Upstream waits for CUDA before it saves the whole model of a run under DeepSpeed."""
    import torch

    torch.cuda.synchronize = lambda device=None: None


def keep_towers_in_fp32() -> None:
    """Upstream's training moves its vision tower to fp16 unless bf16 is given; a CPU has no fp16, its gloo no bf16."""
    import torch

    move = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dtype") == torch.float16:
            kwargs["dtype"] = torch.float32
        return move(self, *args, **kwargs)

    torch.nn.Module.to = to


class Flattening:
    """In place of DeepSpeed's compiled helper: the functions of torch that it wraps."""

    def load(self) -> Any:
        from torch import _utils

        return types.SimpleNamespace(flatten=_utils._flatten_dense_tensors, unflatten=_utils._unflatten_dense_tensors)


def replace_collectives() -> None:
    """What gloo of torch 2.1 lacks, by what it has."""
    import torch
    from deepspeed.comm import torch as backend
    from torch import distributed

    backend.has_coalescing_manager = lambda: False

    def all_gather_into_tensor(output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        with torch.no_grad():
            size = distributed.get_world_size(group)
            parts = list(output_tensor.detach().view(size, -1).unbind())
            distributed.all_gather(parts, input_tensor.detach().clone().view(-1), group=group)
        # DeepSpeed waits for the last of several handles, which says nothing about the others under gloo.
        return Done() if async_op else None

    def reduce_scatter_tensor(
        output: Any, input: Any, op: Any = distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        total = input.detach().clone()
        distributed.all_reduce(total, op=op, group=group)
        with torch.no_grad():
            part = total.view(-1).chunk(distributed.get_world_size(group))[distributed.get_rank(group)]
            output.copy_(part.view_as(output))
        return Done() if async_op else None

    for name in ("all_gather_into_tensor", "_all_gather_base"):
        setattr(distributed, name, all_gather_into_tensor)
        setattr(distributed.distributed_c10d, name, all_gather_into_tensor)
    for name in ("reduce_scatter_tensor", "_reduce_scatter_base"):
        setattr(distributed, name, reduce_scatter_tensor)
        setattr(distributed.distributed_c10d, name, reduce_scatter_tensor)


class Done:
    """The handle of an operation that has ended."""

    def wait(self) -> None:
        """Nothing is left to wait for."""
