"""The work of the routed layers: as many operations for any number of experts, and shapes that no value decides.

Operations are counted below autograd, in forward and backward together, so a loop over experts shows wherever it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from hydralora.config import RoutedLinearConfig
from hydralora.linears import add_updates
from hydralora.tuner import HydraLoraConfig, Linear
from hydralora.tuner.passes import Passes
from tests.hydralora.blocks import make_block
from tests.hydralora.operations import Operations

WIDTH = 8
X = (2, 5, WIDTH)


def tuner_layer(experts: int, **changes: Any) -> nn.Module:
    """A layer of the PEFT method whose experts act."""
    settings: dict[str, Any] = {"r": 4, "lora_nums": experts, "init_weights": False} | changes
    base = nn.Linear(WIDTH, 12).requires_grad_(False)
    return Linear(base, "default", HydraLoraConfig(**settings), Passes())


def adapted_linear(experts: int) -> nn.Module:
    """A projection of an attention module with an update whose experts act."""
    attention = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.add_module(name, nn.Linear(WIDTH, 12))
    add_updates({"attention": [attention]}, RoutedLinearConfig(["attention.q_proj"], experts, rank=4, dropout=0.0))
    attention.q_proj.routed.reset_parameters(identity=False)
    return attention.q_proj


class LoopOverExperts(nn.Module):
    """What must not be: one product after the other. The negative control of the count."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 12) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        return sum(expert(x) for expert in self.experts)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "block_dense": lambda experts: make_block(WIDTH, experts=experts, dense=True),
    "block_sparse": lambda experts: make_block(WIDTH, experts=experts, dense=False),
    "block_dropout": lambda experts: make_block(WIDTH, experts=experts, dropout=0.5).train(),
    "update": adapted_linear,
    "tuner": tuner_layer,
    "tuner_sequence": lambda experts: tuner_layer(experts, routing="sequence"),
    "tuner_dropout": lambda experts: tuner_layer(experts, lora_dropout=0.5).train(),
}
each_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def operations(layer: nn.Module) -> Counter[str]:
    """Operations of forward and backward of one batch."""
    x = torch.randn(X, requires_grad=True)
    with Operations() as operations:
        layer(x).sum().backward()
    assert x.grad is not None
    return operations.counts


@each_layer
def test_the_number_of_operations_does_not_depend_on_the_experts(build: Callable[[int], nn.Module]) -> None:
    few, many = operations(build(2)), operations(build(8))
    assert few == many
    assert sum(few[name] for name in ("aten.mm", "aten.addmm", "aten.bmm")) >= 6, "the count sees matrix products"


def test_the_count_sees_a_loop() -> None:
    few, many = operations(LoopOverExperts(2)), operations(LoopOverExperts(8))
    assert many["aten.addmm"] == 4 * few["aten.addmm"]


@each_layer
def test_no_value_decides_a_shape(build: Callable[[int], nn.Module]) -> None:
    """Runs on tensors that have shapes but no values; whatever asks for a value is an error there."""
    layer = build(3)  # PEFT moves what it adds to a device, which tensors without values do not allow
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(X, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == X


def test_fake_tensors_refuse_a_dispatch_by_value() -> None:
    """The negative control: picking the rows of each expert would be noticed."""
    with FakeTensorMode():
        rows = torch.randn(10, WIDTH)
        with pytest.raises(DynamicOutputShapeException):
            rows[rows.sum(-1) > 0]


@pytest.mark.parametrize("name", ["block_dense", "block_sparse", "update", "tuner"])
def test_the_compiler_sees_one_graph(name: str) -> None:
    """`torch.compile(fullgraph=True)` refuses every break of the graph; outputs and gradients stay the same."""
    layer = LAYERS[name](3)
    inputs = [torch.randn(X, requires_grad=True)]
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if name == "block_sparse":  # the output alone does not train the router in this mode
        trained = [parameter for parameter in trained if parameter is not layer.router.weight]
        trained = [parameter for parameter in trained if parameter is not layer.router.bias]
    expected = layer(inputs[0])
    gradients = torch.autograd.grad(expected.square().sum(), inputs + trained)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs[0])
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    again = torch.autograd.grad(compiled.square().sum(), inputs + trained)
    for ours, eager in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
