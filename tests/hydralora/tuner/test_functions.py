"""`torch.func` on adapted models: functional calls, gradients, per-sample gradients by vmap, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional as F

from hydralora import HydraLoraConfig
from hydralora.layer import shared_code, weighted_experts
from tests.hydralora.tuner.models import IDS, adapted

pytestmark = pytest.mark.versions

Parameters = dict[str, Tensor]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def network(**changes: Any) -> nn.Module:
    """An adapted network whose experts act."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 2, "lora_nums": 3, "target_modules": ["first", "second"], "init_weights": False}
    return get_peft_model(Network(), HydraLoraConfig(**settings | changes))


def trained(model: nn.Module) -> Parameters:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model: nn.Module) -> Callable[[Parameters, Tensor, Tensor], Tensor]:
    """The loss as a function of the trained parameters, inputs (..., 6) and targets (..., 3)."""

    def loss(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, parameters, (x,)), y)

    return loss


def by_autograd(model: nn.Module, x: Tensor, y: Tensor) -> Parameters:
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


CASES = {
    "three experts": {},
    "one of 64 experts": {"lora_nums": 64, "top_k": 1},
    "one expert": {"lora_nums": 1},
    "by sequence": {"routing": "sequence"},
    "half an adapter": {"target_modules": ["second"]},
}
each_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
X, Y = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1)), torch.ones(4, 5, 3)


@each_case
def test_gradients(changes: dict[str, Any]) -> None:
    model = network(**changes).eval()
    parameters = trained(model)
    ours = grad(loss_of(model))(parameters, X, Y)
    expected = by_autograd(model, X, Y)
    assert set(ours) == set(expected)
    assert all(value.abs().max() > 0 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


@each_case
def test_gradients_of_single_samples(changes: dict[str, Any]) -> None:
    model = network(**changes).eval()
    parameters = trained(model)
    ours = vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(parameters, X[:, None], Y[:, None])
    for sample in range(len(X)):
        for name, value in by_autograd(model, X[sample, None], Y[sample, None]).items():
            torch.testing.assert_close(ours[name][sample], value)


def test_outputs_of_several_adapters_at_once() -> None:
    """An ensemble: the trained parameters are what is mapped over."""
    models = [network().eval(), network(init_weights=True).eval()]
    stacked = {name: torch.stack([trained(model)[name] for model in models]) for name in trained(models[0])}
    ours = vmap(lambda parameters: functional_call(models[0], parameters, (X,)))(stacked)
    for index, model in enumerate(models):
        torch.testing.assert_close(ours[index], model(X))


def test_dropout_draws_one_mask_per_sample() -> None:
    model = network(lora_dropout=0.5).train()
    parameters, row = trained(model), torch.ones(1, 6)
    torch.manual_seed(3)
    ours = vmap(grad(loss_of(model)), in_dims=(None, 0, 0), randomness="different")(
        parameters, row.expand(8, 1, 6), torch.ones(8, 1, 3)
    )
    name = next(name for name in ours if "first.lora_A" in name)
    columns = (ours[name] != 0).any(dim=1)  # (8, 6): inputs of A that were kept
    assert columns.unique(dim=0).shape[0] > 1
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(parameters, row.expand(8, 1, 6), torch.ones(8, 1, 3))


def test_gradients_of_dropped_inputs_are_those_of_autograd() -> None:
    model = network(lora_dropout=0.5).train()
    torch.manual_seed(5)
    expected = by_autograd(model, X, Y)
    torch.manual_seed(5)
    ours = grad(loss_of(model))(trained(model), X, Y)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def double(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def dropped_code(x: Tensor, shared_a: Tensor) -> Tensor:
    torch.manual_seed(0)
    return shared_code(x, shared_a, 0.5)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "experts": (lambda *given: weighted_experts(*given, 0.5), (double(3, 2), double(5, 8), double(3, 4))),
    "stacked experts": (lambda *given: weighted_experts(*given, 0.5), (double(3, 2), double(4, 5, 2), double(3, 4))),
    "whole sequences": (weighted_experts, (double(2, 3, 2), double(5, 8), double(2, 1, 4))),
    "dropout": (dropped_code, (double(3, 6), double(2, 6))),
}


@pytest.mark.parametrize(("function", "given"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_first_and_second_derivatives(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
    """Against finite differences."""
    assert torch.autograd.gradcheck(function, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, given)


def test_the_hessian_of_a_model() -> None:
    model = network(target_modules=["second"], r=1, lora_nums=2).double().eval()
    parameters, x, y = trained(model), X.double(), Y.double()
    name = next(name for name in parameters if "router" in name)

    def of_router(router: Tensor) -> Tensor:
        return loss_of(model)(parameters | {name: router}, x, y)

    second = jacrev(grad(of_router))(parameters[name])
    torch.testing.assert_close(second, torch.autograd.functional.hessian(of_router, parameters[name]))
    assert second.abs().max() > 1e-4


def test_a_language_model() -> None:
    """Gradients of single rows, which differentially private training needs."""
    model = adapted()
    parameters = trained(model)
    name = next(name for name in parameters if "gate_proj.lora_B" in name)

    def loss(parameters: Parameters, ids: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (), {"input_ids": ids[None], "use_cache": False}).logits[0]
        return F.cross_entropy(logits[:-1], ids[1:])

    rows = IDS[:2, :4]
    ours = vmap(grad(loss), in_dims=(None, 0))(parameters, rows)
    for index, row in enumerate(rows):
        model.zero_grad()
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        expected = model.get_parameter(name).grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours[name][index], expected, rtol=1e-4, atol=1e-6)


@each_case
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, when it first derives in forward mode
def test_forward_mode(changes: dict[str, Any], dropout: float) -> None:
    """A derivative along one direction is the product with the gradient; mapped over several directions too."""
    model = network(lora_dropout=dropout, **changes).train()
    parameters = trained(model)
    directions = {name: torch.randn(2, *value.shape) for name, value in parameters.items()}

    def along(direction: Parameters) -> Tensor:
        torch.manual_seed(5)
        return jvp(lambda given: loss_of(model)(given, X, Y), (parameters,), (direction,))[1]

    torch.manual_seed(5)
    gradient = grad(loss_of(model))(parameters, X, Y)
    for number in range(2):
        direction = {name: value[number] for name, value in directions.items()}
        expected = sum((gradient[name] * direction[name]).sum() for name in gradient)
        assert expected.abs() > 1e-4
        torch.testing.assert_close(along(direction), expected, rtol=1e-4, atol=1e-6)
    if not dropout:
        both = vmap(along)(directions)
        torch.testing.assert_close(both[1], along({name: value[1] for name, value in directions.items()}))


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_a_loss_on_the_routing_is_refused(transform: str) -> None:
    """Its gradient is added by autograd's backward pass, which is not run."""
    model = network(balance_weight=0.5).train()
    parameters, loss = trained(model), loss_of(model)

    def along(given: Parameters) -> Any:
        return jvp(lambda parameters: loss(parameters, X, Y), (given,), (given,))

    transformed = grad(lambda given: loss(given, X, Y)) if transform == "grad" else along
    with pytest.raises(RuntimeError, match=r"balance_weight, information_weight: .* torch\.func"):
        transformed(parameters)
    assert grad(loss_of(model.eval()))(parameters, X, Y)
