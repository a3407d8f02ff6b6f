"""Fake tensors of a device that need not exist, of which small ones know their values.

`torch._subclasses.FakeTensorMode` computes shapes, dtypes and devices and nothing else, and refuses operations on
tensors of several devices. Two things keep it from running a training step: where there is no CUDA, autograd cannot run
backward on tensors that say they are on it; and code asks some tensors for numbers (ids, masks, lengths). So autograd
is told that the tensors are on `meta`, and tensors of few elements that follow from known ones carry their values
along. Whenever a program waits for a number from the device, that is counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from llava.runtime.rehearsal.cuda_rules import cuda_rules

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default

WAITS = {
    aten._local_scalar_dense.default: "a number is read",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
}
"""Operations for whose result, or its shape, the program has to wait until the device has finished all before."""

_EMPTY = (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided)
"""Operations whose results have no values yet."""

_FUSED = {
    aten._scaled_dot_product_flash_attention.default: 9,
    aten._scaled_dot_product_efficient_attention.default: 4,
}
"""Fused attention that a CPU does not have, and how many results it has."""

_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class UnknownValueError(RuntimeError):
    """The program asks for a number that depends on weights, which a rehearsal does not have."""


class FakeDevice(TorchDispatchMode):
    """Tensors made while this mode is on are fake; entered by `on_device`.

    Args:
        device: what their `device` says.
        known_up_to: most elements of a tensor whose values are computed; None: all tensors have values, so that the
            computation is a real one, whose devices are checked.
        unknown_truth: what the program is told where it asks whether something is so and that depends on weights (is
            the loss finite?); None: an error.

    Attributes:
        unknown_number: as `unknown_truth`, for a number; may be set where what is read is known not to matter.
        waits: how often the program waited for the device, by the kind of operation.
    """

    def __init__(
        self, device: torch.device, known_up_to: int | None = 1 << 22, unknown_truth: bool | None = None
    ) -> None:
        super().__init__()
        self.device = device
        self.unknown_truth = unknown_truth
        self.unknown_number: float | None = None
        self.known_up_to = known_up_to
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.waits: Counter[str] = Counter()

    def put(self, value: Tensor, device: torch.device | None = None) -> Tensor:
        """A fake tensor on the device (or another one) that knows its value."""
        with _disable_current_modes():
            kept = value.detach().cpu().clone()
        with self.fake:
            made = torch.empty_strided(
                kept.shape, kept.stride(), dtype=kept.dtype, device=self.device if device is None else device
            )
        _remember(made, kept)
        return made

    def value_of(self, tensor: Tensor) -> Tensor:
        """The values of a fake tensor.

        Raises:
            UnknownValueError: they depend on values that are not known.
        """
        value = _value(tensor)
        if value is None:
            raise UnknownValueError(f"a tensor of shape {tuple(tensor.shape)} has no values in a rehearsal")
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation: shapes by `FakeTensorMode`, values where they are known."""
        if func is _DEVICE:  # asked by C++ alone; Python reads `fake_device`
            place = args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
            return place if place.type == "cpu" else torch.device("meta")
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = self.device  # C++ took it from a tensor that it believes to be on meta
        if func in _INDEXED:
            args = self._with_positions(func, args)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        self._count(func, inputs, kwargs)
        values = self._values(func, args, kwargs, inputs)
        if torch.Tag.data_dependent_output in func.tags:  # a number or a truth value for Python
            return self._unknown(func, inputs) if values is None else values
        if func in WAITS and values is not None:  # the shape of the result depends on the values
            place = _place(inputs[0])
            return tree_map(lambda leaf: self.put(leaf, place) if isinstance(leaf, Tensor) else leaf, values)
        result = func(*args, **kwargs)
        self._note(func, inputs, result, values)
        return result

    def _unknown(self, func: Any, inputs: Sequence[Tensor]) -> float | bool:
        """What the program is told in place of a value that depends on weights."""
        is_number = func is aten._local_scalar_dense.default and inputs[0].dtype != torch.bool
        told = self.unknown_number if is_number else self.unknown_truth
        if told is None:
            raise UnknownValueError("a number is read from a tensor whose values depend on weights")
        return told

    def _count(self, func: Any, inputs: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
        """Count a wait: reading numbers, and copying to the host."""
        if not any(_place(tensor) == self.device for tensor in inputs):
            return
        if func in WAITS:
            self.waits[WAITS[func]] += 1
        target = kwargs.get("device")
        to_host = func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu"
        to_host |= func is aten.copy_.default and _place(inputs[0]).type == "cpu"
        if to_host and self.device.type != "cpu" and not kwargs.get("non_blocking"):
            self.waits["a copy to the host"] += 1

    def _with_positions(self, func: Any, args: Any) -> Any:
        """Boolean masks among indices become the positions that they select, for which a device has to be waited."""
        indices, found = [], False
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                found = True
                if _place(index) == self.device:
                    self.waits["a mask as index"] += 1
                place = _place(index)
                with _disable_current_modes():
                    positions = self.value_of(index).nonzero(as_tuple=True)
                indices += [self.put(each, place) for each in positions]
            else:
                indices.append(index)
        return (args[0], indices, *args[2:]) if found else args

    def _values(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: Sequence[Tensor]) -> Any:
        """Result of the same operation on the values; None if one of them is not known, or it is too large."""
        if any(isinstance(tensor, FakeTensor) and _value(tensor) is None for tensor in inputs):
            return None
        everything = self.known_up_to is None
        if not everything and (torch.Tag.nondeterministic_seeded in func.tags or func._overloadpacket in _EMPTY):
            return None
        if not inputs and not everything and _requested(args) > (self.known_up_to or 0):
            return None
        if not everything and sum(tensor.numel() for tensor in inputs) > 4 * (self.known_up_to or 0):
            return None
        leaves, form = tree_flatten((args, kwargs))
        with _disable_current_modes():
            real = [_value(x) if isinstance(x, FakeTensor) else _on_cpu(x) for x in leaves]
            real_args, real_kwargs = tree_unflatten(real, form)
            if func in _FUSED:
                return _fused(func, *real_args, **real_kwargs)
            return func(*real_args, **real_kwargs)

    def _note(self, func: Any, inputs: Sequence[Tensor], result: Any, values: Any) -> None:
        """Keep the values of what an operation made; forget those of what it changed in an unknown way."""
        if values is None:
            if func._schema.is_mutable:
                for tensor in inputs:
                    if any(tensor is out for out in tree_flatten(result)[0]):
                        _remember(tensor, None)
            return
        made, real = tree_flatten(result)[0], tree_flatten(values)[0]
        for fake, value in zip(made, real, strict=True):
            small = self.known_up_to is None or (isinstance(value, Tensor) and value.numel() <= self.known_up_to)
            if isinstance(fake, FakeTensor) and small:
                _remember(fake, value)


_KNOWN = "_known_value"


def _value(tensor: Tensor) -> Tensor | None:
    """The values of a fake tensor; kept on it, as a module that changes its weights does not allow weak references."""
    return getattr(tensor, _KNOWN, None)


def _remember(tensor: Tensor, value: Tensor | None) -> None:
    setattr(tensor, _KNOWN, value)


def _fused(func: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None = None) -> Any:
    """The output of fused attention, and nothing for what it keeps for backward."""
    flash = _FUSED[func] == 9
    # Trailing arguments that have their defaults are left out.
    bias, is_causal = (None, rest[1:2] == (True,)) if flash else (rest[0], rest[3:4] == (True,))
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.to(query.dtype)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, is_causal=is_causal, scale=scale)
    return (output, *([None] * (_FUSED[func] - 1)))


def _place(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _on_cpu(leaf: Any) -> Any:
    """An argument for the operation on values: everything is on the CPU there."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _requested(args: Any) -> int:
    """Elements of the tensor that a factory is about to make; its shape is the first argument, if it has one."""
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    return int(torch.Size(shape).numel()) if all(isinstance(size, int) for size in shape) else 0


@contextlib.contextmanager
def on_device(fake: FakeDevice) -> Iterator[FakeDevice]:
    """Make every tensor within the block a fake one of `fake`'s device; where it is not the CPU, with CUDA's rules."""
    rules: Callable[[], Any] = cuda_rules if fake.device.type == "cuda" else contextlib.nullcontext

    def listed(tensor: FakeTensor) -> Any:
        if fake.device == _place(tensor):  # torch copies the whole tensor at once
            fake.waits[WAITS[aten._local_scalar_dense.default]] += 1
        with _disable_current_modes():
            return fake.value_of(tensor).tolist()

    with (
        patch.object(FakeTensor, "tolist", listed),
        patch("torch.utils.swap_tensors", _replace_contents),
        # transformers takes fake tensors for a tracer's and would not look whether a mask can be left out.
        patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False),
        fake.fake,
        fake,
        rules(),
    ):
        yield fake


_swap_tensors = torch.utils.swap_tensors


def _replace_contents(parameter: Tensor, converted: Tensor) -> None:
    """What `Module.to` needs of swapping: torch refuses to swap fake tensors, as its own mode refers to them."""
    if not isinstance(parameter, FakeTensor) or not isinstance(converted, FakeTensor):
        _swap_tensors(parameter, converted)
        return
    parameter.data = converted.data
    parameter.fake_device = converted.fake_device
