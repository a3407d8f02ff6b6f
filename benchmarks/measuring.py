"""How time and memory of forward and backward are measured, and the time of decoding.

Time: the methods take turns, each round beginning with another one, so that whatever else the machine does meets all of
them; ratios are taken within a round. On the CPU with one thread the clock counts the time that this process computed,
so other programs on the machine count as little as possible; otherwise it is the wall clock, after synchronising.

Memory: what autograd keeps between forward and backward, each storage once, parameters left out.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEPS = 50
"""Forward passes between two readings of the clock, of something as short as a layer on one token."""


@dataclass(frozen=True)
class Clock:
    """How time is read.

    Attributes:
        name: `process` or `wall`.
        read: seconds.
    """

    name: str
    read: Callable[[], float]


def clock_for(device: torch.device, threads: int) -> Clock:
    """The clock for a device; see the top of this file."""
    if device.type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return Clock("wall", synchronised)
    return Clock("process", time.process_time) if threads == 1 else Clock("wall", time.perf_counter)


def run_once(module: nn.Module, x: Tensor, cotangent: Tensor) -> None:
    """Forward and backward of one batch, without gradients from before.

    Args:
        module: (1, L, D) to (1, L, outputs).
        x: (1, L, D), a leaf that requires a gradient, as inside a model.
        cotangent: gradient of the output, of its shape.
    """
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(cotangent)


def run_tokens(module: nn.Module, x: Tensor) -> None:
    """`STEPS` forward passes without gradients, as decoding makes one for every token."""
    with torch.inference_mode():
        for _ in range(STEPS):
            module(x)


def interleaved_times(
    methods: Mapping[str, nn.Module],
    x: Tensor,
    cotangent: Tensor | None,
    clock: Clock,
    rounds: int,
    warmup: int,
    after_round: Callable[[], object],
) -> dict[str, list[float]]:
    """Milliseconds of each method in each of `rounds` rounds, which follow `warmup` others that do not count.

    Timed are forward and backward, or, without a cotangent, one forward pass without gradients (the mean of `STEPS`).
    `after_round` is called after every one (a progress bar).
    """
    passes = STEPS if cotangent is None else 1

    def way(module: nn.Module) -> Callable[[], object]:
        return lambda: run_tokens(module, x) if cotangent is None else run_once(module, x, cotangent)

    ways = {name: way(module) for name, module in methods.items()}
    times = take_turns(ways, clock, rounds, warmup, after_round)
    return {name: [1e3 * seconds / passes for seconds in values] for name, values in times.items()}


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Collect garbage once, and not while something is timed."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    clock: Clock,
    rounds: int,
    warmup: int = 1,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each way in each of `rounds` rounds, which follow `warmup` others that do not count.

    Each round begins with another way. `after_round` is called after every one (a progress bar).
    """
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _without_collecting():
        for number in range(warmup + rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                start = clock.read()
                ways[name]()
                times[name].append(clock.read() - start)
            after_round()
    return {name: values[warmup:] for name, values in times.items()}


def quotient(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of two ways, taken within each round."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, quartiles and maximum; one value is all of them."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    lower, median, upper = quartiles
    return {"min": min(values), "lower_quartile": lower, "median": median, "upper_quartile": upper, "max": max(values)}


class _Kept:
    """A tensor that autograd keeps; alive as long as the graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass leaves behind for backward.

    The input is among them, views count as their whole storage, parameters do not count. What only parts of the graph
    kept that do not lead to the output is gone when this counts.
    """
    alive: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())  # an output that its own node keeps would hold itself alive otherwise
        alive.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = module(x)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found = [reference() for reference in alive]
    storages = [kept.tensor.untyped_storage() for kept in found if kept is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in parameters}
    del output
    return sum(sizes.values())


def peak_bytes(module: nn.Module, x: Tensor, cotangent: Tensor) -> int | None:
    """Most bytes that forward and backward had allocated beyond what was there before; None without CUDA."""
    if x.device.type != "cuda":
        return None
    run_once(module, x, cotangent)  # workspaces of the libraries are made in the first call
    x.grad = None
    module.zero_grad(set_to_none=True)
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    run_once(module, x, cotangent)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before
