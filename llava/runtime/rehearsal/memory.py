"""How many bytes of tensors live at once, by what they are for, seen by a dispatch mode.

Counted is each storage once, from the operation that made it until the last tensor on it is gone: real tensors and fake
ones alike. The size of a process, and what an allocator reserves or a kernel uses inside, are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry


class Part(StrEnum):
    """What bytes are for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOGITS = "logits"


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes while it is on, and the floating-point operations.

    Args:
        device: of the tensors that count.
        vocabulary: size of the last axis by which logits are known.

    Attributes:
        peak: the bytes of each part when their sum was largest.
        peak_work: activations and logits when their sum was largest.
        flops: of matrix products, convolutions and attention (a multiplication and an addition are two).
    """

    def __init__(self, device: torch.device, vocabulary: int) -> None:
        super().__init__()
        self.device, self.vocabulary = device, vocabulary
        self.now = dict.fromkeys(Part, 0)
        self.peak = dict(self.now)
        self.peak_work = self._work()
        self.flops = 0
        self._live: dict[int, tuple[int, Part, Any]] = {}
        self._hooks: list[Any] = []

    @property
    def peak_bytes(self) -> int:
        """The largest sum."""
        return sum(self.peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation: run it and look at what it made."""
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                self.count(leaf, None)
        return result

    def count(self, tensor: Tensor, part: Part | None) -> None:
        """Count the storage of a tensor, or say what one that is counted already is for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            if part is not None and part is not known[1]:
                self.now[known[1]] -= known[0]
                self.now[part] += known[0]
                self._live[key] = (known[0], part, known[2])
            return
        part = part or (Part.LOGITS if self._is_logits(tensor) else Part.ACTIVATIONS)
        size = int(storage.nbytes())
        self._live[key] = (size, part, weakref.ref(storage, lambda _: self._free(key)))
        self.now[part] += size
        self._raise_peaks()

    def _work(self) -> dict[Part, int]:
        return {part: self.now[part] for part in (Part.ACTIVATIONS, Part.LOGITS)}

    def _raise_peaks(self) -> None:
        if sum(self.now.values()) > self.peak_bytes:
            self.peak = dict(self.now)
        if self.now[Part.ACTIVATIONS] + self.now[Part.LOGITS] > sum(self.peak_work.values()):
            self.peak_work = self._work()

    def _free(self, key: int) -> None:
        size, part, _ = self._live.pop(key)
        self.now[part] -= size

    def _is_logits(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()

    def watch(self, model: nn.Module) -> None:
        """Count the weights and buffers of a model, and its gradients as soon as they are there."""
        for weight in (*model.parameters(), *model.buffers()):
            for tensor in (weight, *_companions(weight)):
                if tensor.device.type == self.device.type:
                    self.count(tensor, Part.WEIGHTS)
        for weight in model.parameters():
            if weight.requires_grad:
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._note_gradient))

    def _note_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self.count(weight.grad, Part.GRADIENTS)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count what an optimizer has made of states so far as its own."""
        for state in optimizer.state.values():
            for leaf in tree_flatten(dict(state))[0]:
                if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                    self.count(leaf, Part.OPTIMIZER)

    def forget_peak(self) -> None:
        """Begin again: the peak is what lives now, no operations have been made."""
        self.peak, self.peak_work, self.flops = dict(self.now), self._work(), 0

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _companions(weight: Tensor) -> Iterable[Tensor]:
    """The constants of a quantized weight."""
    state = getattr(weight, "quant_state", None)
    nested = getattr(state, "state2", None)
    for each in filter(None, (state, nested)):
        yield from (x for x in (each.absmax, each.code, getattr(each, "offset", None)) if isinstance(x, Tensor))
