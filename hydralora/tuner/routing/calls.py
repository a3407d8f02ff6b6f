"""A call that asks for a routing: its arguments are taken out before the model sees them, and reach every layer.

They hold in the thread of the call, until it returns, and in what gradient checkpointing recomputes of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hydralora.tuner.calls.inputs import token_shape
from hydralora.tuner.config import RoutingUnit
from hydralora.tuner.linear import HydraLoraLayer
from hydralora.tuner.passes import Passes
from hydralora.tuner.routing.given import NAMES, Given, GivenRoutingError, read_given

_LENDING = threading.Lock()


@contextmanager
def asked_routing(
    model: nn.Module, passes: Passes, adapters: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Around a call of `forward` or `generate`: what it asks for holds within; nothing stays behind.

    Args:
        model: the host.
        passes: of its layers.
        adapters: names of the adapters that run.
        args: positional arguments of the call.
        kwargs: its other arguments, those for the routing included.

    Raises:
        GivenRoutingError: what is asked for cannot be carried out by these adapters or for these rows.
    """
    given = read_given(kwargs)
    if given is None:
        yield
        return
    check_takers(model, adapters, given)
    shape = _tokens(args, kwargs)
    _check_rows(given, shape)
    given.shape = shape
    with _in_force(model, passes, given), ExitStack() as stack:
        caller = threading.get_ident()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """Forward pre-hook of a model: how many tokens it has, and what it must not see."""
            if threading.get_ident() != caller:
                return None
            found = _tokens(args, kwargs)
            if shape is None and module is model:  # a forward pass, whose inputs PEFT does not show before
                _check_rows(given, found)
            given.shape = found or given.shape
            return args, _without(kwargs) if module is model else kwargs

        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        stack.enter_context(_generate_without(model))
        yield


@contextmanager
def forced_routing(
    model: nn.Module, *, routing_weights: Any = None, expert: int | None = None, tasks: Any = None
) -> Iterator[None]:
    """Within the block, every call of a model is routed so, in this thread; for code that makes the calls itself.

    Args:
        model: an adapted model, or something that has one in it.
        routing_weights: (E,) weights of the experts, the same for all rows.
        expert: number of the only expert that acts.
        tasks: name or number of a task, for adapters that route by task.

    Raises:
        GivenRoutingError: nothing or too much is asked for, it differs between rows, or no adapter can do it.
    """
    given = read_given({"routing_weights": routing_weights, "expert": expert, "tasks": tasks})
    if given is None or given.rows is not None:
        raise GivenRoutingError(
            "give routing_weights (one vector), expert or tasks (one), the same for all rows; what differs between "
            "rows is an argument of the call itself"
        )
    layers = _layers(model)
    check_takers(model, [name for layer in layers for name in layer.active_adapters], given)
    with ExitStack() as stack:
        for passes in {id(layer.passes): layer.passes for layer in layers}.values():
            stack.enter_context(_in_force(model, passes, given))
        yield


def check_takers(model: nn.Module, adapters: Sequence[str], given: Given) -> None:
    """Refuse what no adapter that runs can carry out.

    Raises:
        GivenRoutingError: says which adapters run, and what they do.
    """
    names = list(dict.fromkeys(adapters))
    layers = _layers(model)
    experts = {name: max((layer.experts.get(name, 0) for layer in layers), default=0) for name in names}
    if given.forces and not any(count > 1 for count in experts.values()):
        raise GivenRoutingError(f"adapters {experts} (name: experts) have no experts to choose from")
    by_task = [name for name in names if any(name in layer.lora_tasks for layer in layers)]
    if given.tasks is not None and not by_task:
        raise GivenRoutingError(f"tasks were given, but none of the adapters {names} has routing='{RoutingUnit.TASK}'")


def _layers(model: nn.Module) -> list[HydraLoraLayer]:
    return [module for module in model.modules() if isinstance(module, HydraLoraLayer)]


@contextmanager
def _in_force(model: nn.Module, passes: Passes, given: Given) -> Iterator[None]:
    if model.training:
        passes.asked = True
        passes.bind_checkpoints(model)
    with passes.given.holding(given):
        yield


def _check_rows(given: Given, shape: tuple[int, int] | None) -> None:
    if given.rows is not None and shape is not None and given.rows != shape[0]:
        raise GivenRoutingError(
            f"the routing is for {given.rows} rows, but the batch has {shape[0]}; give one per row, or one for all"
        )


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    decoder = {name.removeprefix("decoder_"): value for name, value in kwargs.items() if name.startswith("decoder_")}
    return token_shape(args, kwargs) or token_shape((), decoder)


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in NAMES}


class _Stripped:
    """`generate` of a model, without the arguments for the routing, which it would refuse as unknown."""

    def __init__(self, model: nn.Module) -> None:
        self.before = vars(model).get("generate")
        self.generate = model.generate
        self.users = 0
        functools.update_wrapper(self, self.generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.generate(*args, **_without(kwargs))


@contextmanager
def _generate_without(model: nn.Module) -> Iterator[None]:
    """The model's `generate` takes and drops the arguments for the routing while any call needs it."""
    if not callable(getattr(model, "generate", None)):
        yield
        return
    with _LENDING:
        stripped = vars(model).get("generate")
        if not isinstance(stripped, _Stripped):
            stripped = _Stripped(model)
            model.generate = stripped
        stripped.users += 1
    try:
        yield
    finally:
        with _LENDING:
            stripped.users -= 1
            if not stripped.users and vars(model).get("generate") is stripped:
                del model.generate
                if stripped.before is not None:
                    model.generate = stripped.before
