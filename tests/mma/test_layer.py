"""The adapters against the original's values and gradients, and their behaviour beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mma.layer import PointwiseConv, RepAdapter, RoutedRepAdapter, grouped_linear, through
from tests.golden import load_case

CASES = [
    "adapter_router_s1_t10",
    "adapter_router_s05_t5",
    "adapter_router_given_s05",
    "adapter_plain_s1",
    "adapter_plain_s05",
]
VALUE = {"rtol": 1e-5, "atol": 1e-5}


def golden_adapter(name: str) -> tuple[RepAdapter, dict[str, Tensor]]:
    """The adapter of a golden case with its weights, in evaluation mode, and the tensors of the case."""
    case, tensors = load_case("lavin", name)
    hp: dict[str, Any] = case["hyper_parameters"]
    sizes = (hp["in_features"], hp["hidden_dim"], hp["groups"])
    adapter = (
        RepAdapter(*sizes) if hp["t"] is None else RoutedRepAdapter(*sizes, scale=hp["scale"], temperature=hp["t"])
    )
    weights = {key.removeprefix("w/"): value for key, value in tensors.items() if key.startswith("w/")}
    adapter.load_state_dict(weights)  # strict: the names are the original's
    return adapter.eval(), tensors


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_golden(name: str) -> None:
    adapter, tensors = golden_adapter(name)
    inputs = {key: tensors[f"in/{key}"].clone().requires_grad_() for key in ("x", "weights") if f"in/{key}" in tensors}
    y = adapter(*inputs.values())
    torch.testing.assert_close(y, tensors["out/y"], **VALUE)
    if "out/routing_weights" in tensors and "weights" not in inputs:
        assert isinstance(adapter, RoutedRepAdapter)
        torch.testing.assert_close(adapter.route(inputs["x"][:, 0]), tensors["out/routing_weights"], **VALUE)
    (y * tensors["in/cotangent"]).sum().backward()
    ours = {key: value.grad for key, value in (*inputs.items(), *adapter.named_parameters()) if value.grad is not None}
    expected = {key.removeprefix("grad/"): value for key, value in tensors.items() if key.startswith("grad/")}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        error = float((ours[key] - value).abs().max())
        assert error <= 1e-3 * float(value.abs().max()), f"{key}: {error}"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_pointwise_convolution_is_a_convolution(groups: int) -> None:
    conv, z = PointwiseConv(8, 24, groups), torch.randn(3, 5, 8)
    expected = torch.nn.Conv1d.forward(conv, z.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(conv(z), expected)
    torch.testing.assert_close(conv(z[0, 0]), expected[0, 0])
    other, factors = PointwiseConv(8, 24, groups), torch.rand(2, 3, 1, 1)
    both = grouped_linear([z, 2 * z], list(factors), [conv(), other()], groups)
    torch.testing.assert_close(both, factors[0] * expected + factors[1] * other(2 * z))


def test_a_fresh_routed_adapter_changes_nothing_and_a_fresh_plain_one_gives_zero() -> None:
    x = torch.randn(2, 3, 24)
    assert torch.equal(RoutedRepAdapter(24)(x), x)
    assert not RepAdapter(24)(x).any()


def test_the_first_position_routes_its_own_sample_alone() -> None:
    adapter = golden_adapter("adapter_router_s05_t5")[0]
    x = torch.randn(2, 4, 24)
    other = x.clone()
    other[0, 0] += 3
    ours, changed = adapter(x), adapter(other)
    assert torch.equal(ours[1], changed[1])
    assert bool((ours[0, 1:] != changed[0, 1:]).any())


def test_an_adapter_for_known_weights() -> None:
    """Of one choice of weights, and of all of them with a choice for each sample; 2 products of the input."""
    adapter = golden_adapter("adapter_router_s05_t5")[0]
    assert isinstance(adapter, RoutedRepAdapter)
    x, routing = torch.randn(3, 4, 24), torch.rand(2, 2)
    own = torch.tensor([1, 0, 1])
    expected = adapter(x, routing[own])
    together = adapter.mixed(routing)
    assert [tuple(part.shape) for part in together] == [(18, 24), (18,), (18, 24)]
    chosen = torch.eye(2)[own].repeat_interleave(9, dim=1)[:, None]
    torch.testing.assert_close(through(x, together, chosen), expected)
    torch.testing.assert_close(through(x[1:2], adapter.mixed(routing[0])), expected[1:2])
    assert through(x.bfloat16(), together, chosen).dtype == torch.bfloat16


def test_weights_may_be_given_token_by_token() -> None:
    adapter = golden_adapter("adapter_router_s05_t5")[0]
    x, routing = torch.randn(2, 4, 24), torch.rand(2, 4, 2)
    whole = adapter(x, routing)
    for place in range(4):
        alone = adapter(x[:, place : place + 1], routing[:, place])
        torch.testing.assert_close(whole[:, place : place + 1], alone)


def test_dropout_acts_in_training_alone() -> None:
    adapter = golden_adapter("adapter_router_s05_t5")[0]
    adapter.dropout = 0.5
    x = torch.randn(2, 4, 24)
    assert torch.equal(adapter(x), adapter(x))
    assert not torch.equal(adapter.train()(x), adapter(x))


def test_groups_must_divide_both_widths() -> None:
    with pytest.raises(ValueError, match="multiples of the number of groups 3"):
        RepAdapter(24, 8, 3)
