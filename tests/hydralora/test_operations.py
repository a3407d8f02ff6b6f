"""What it costs to look at the routing: at most two operations for each layer, counted, not timed.

Without that, statistics of a model with many adapted layers take more operations than its forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods import Case, build_methods
from hydralora import RoutingCallback, expert_balance_loss, record_routing
from hydralora.model import RoutingRecorder, of_text, routed_modules
from hydralora.observation import watch_utilization
from hydralora.statistics import TaskStatistics
from tests.hydralora.operations import Operations
from tests.hydralora.test_callback import blocks, updates
from tests.hydralora.tuner.models import IDS, MASK, adapted, tiny_llama

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100), "use_cache": False}
PER_LAYER = 2
MORE = {"token": 1, "block": 4}
"""Matrix products of one token beyond LoRA's: the router's, and in a block those that mix the B of a projection."""


def tuned(depth: int = 2, **changes: Any) -> nn.Module:
    """An adapter on every linear layer, seven routers for each layer."""
    return adapted(base=tiny_llama(num_hidden_layers=depth), target_modules=LINEARS, **changes).train()


@contextmanager
def nothing(model: nn.Module) -> Iterator[Callable[[], object]]:
    yield lambda: None


@contextmanager
def recorded(model: nn.Module) -> Iterator[Callable[[], object]]:
    recording = record_routing(model)
    routing = recording.__enter__()
    yield lambda: recording.__exit__(None, None, None)
    assert len(routing) == len(routed_modules(model))


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], object]]:
    """As the fine-tuning program does."""
    statistics, recorder = TaskStatistics(), RoutingRecorder(routed_modules(model))
    recorder.start()
    tasks = ["a", "", "b"]
    yield lambda: statistics.add(list(of_text(recorder.stop(), tuple(IDS.shape)).values()), MASK, tasks)
    assert {"routing/entropy", "routing/task_a/share_0", "routing/task_b/share_2"} <= statistics.pop().keys()


@contextmanager
def called_back(model: nn.Module) -> Iterator[Callable[[], object]]:
    callback, state = RoutingCallback(), SimpleNamespace(global_step=0, logging_steps=1)
    arguments = SimpleNamespace(logging_strategy="steps", logging_first_step=False)
    callback.on_train_begin(arguments, state, None, model=model)
    callback.on_step_begin(arguments, state, None)
    yield lambda: None
    callback.on_step_end(arguments, state, SimpleNamespace(should_log=True))
    assert len(callback._values) > 4 * len(routed_modules(model))
    callback.on_train_end(arguments, state, None, model=model)


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[], object]]:
    parts = routed_modules(model)
    with watch_utilization([parts]) as watch:
        watch.enter(0, MASK.bool())
        yield lambda: None
    assert watch.shares(1).keys() == parts.keys()


LOOKS = {"record_routing": recorded, "statistics": counted, "RoutingCallback": called_back, "utilization": watched}


def operations(model: nn.Module, look: Callable[[nn.Module], Any] = nothing) -> int:
    """Operations of forward and backward, and of looking."""
    with look(model) as finish, Operations() as found:
        loss = model(**BATCH).loss
        finish()
        loss.backward()
    model.zero_grad()
    return found.counts.total()


@pytest.mark.parametrize("build", [tuned, blocks, updates], ids=["adapter", "blocks", "updates"])
def test_statistics_cost_two_operations_a_layer(build: Callable[[], nn.Module]) -> None:
    model = build()
    layers, before = len(routed_modules(model)), operations(model)
    beyond = {name: operations(model, look) - before for name, look in LOOKS.items()}
    assert beyond["statistics"] == 1, "whatever the number of layers"
    assert max(beyond.values()) <= PER_LAYER * layers


def losses(model: nn.Module, weight: float) -> nn.Module:
    """The balance loss as LLaVA's training adds it to the model's, by the graph of all layers."""

    class Balanced(nn.Module):
        def forward(self, **batch: Tensor) -> Any:
            recorder = RoutingRecorder(routed_modules(model))
            recorder.start()
            output = model(**batch)
            routings = list(of_text(recorder.stop(), tuple(IDS.shape)).values())
            if weight:
                output.loss = output.loss + weight * expert_balance_loss(routings, MASK)
            return output

    return Balanced()


@pytest.mark.parametrize(
    ("build", "routers"),
    [
        (lambda depth, weight: tuned(depth, balance_weight=weight), len(LINEARS)),
        (lambda depth, weight: losses(tuned(depth), weight), len(LINEARS)),
        (lambda depth, weight: losses(blocks(depth), weight), 1),
    ],
    ids=["within the adapter", "of an adapter", "of blocks"],
)
def test_the_balance_loss_costs_two_operations_a_layer(build: Callable[..., nn.Module], routers: int) -> None:
    """In forward and backward together, of three layers beyond one; what is done once for all does not count."""
    extra = {depth: operations(build(depth, 0.5)) - operations(build(depth, 0.0)) for depth in (1, 3)}
    assert 0 <= extra[3] - extra[1] <= PER_LAYER * 2 * routers


def decoding(layer: nn.Module, width: int) -> Counter[str]:
    """Operations of one token in evaluation."""
    with torch.no_grad(), Operations() as found:
        layer.eval()(torch.randn(1, 1, width))
    return found.counts


@pytest.mark.parametrize("kind", ["token", "block"])
def test_decoding_copies_no_weights(kind: str) -> None:
    """Beyond LoRA one token costs a product with the router, a softmax and few numbers; nothing is put side by side."""
    methods = build_methods(Case(kind, 24, 40, 3, 4, 0.0), torch.device("cpu"), torch.float32)
    lora, ours = (decoding(methods[name], 24) for name in ("lora", "hydralora"))
    assert not {"aten.clone", "aten.copy_", "aten._to_copy", "aten.cat", "aten.stack"} & ours.keys()
    assert (ours["aten.mm"] + ours["aten.addmm"], ours["aten._softmax"]) == (lora["aten.mm"] + MORE[kind], 1), ours
