"""One token in evaluation takes a way of its own, which gives the numbers of the other one, and only where it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import hydralora.tuner.linear
from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from hydralora.tuner.decoding import one_token
from hydralora.tuner.linear import HydraLoraLayer
from hydralora.tuner.routing.calls import forced_routing
from hydralora.tuner.scaling import rescale
from tests.hydralora.tuner.models import IDS, adapted


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer has taken the way for one token."""
    ways: list[bool] = []

    def watched(*args: Any) -> Tensor | None:
        found = one_token(*args)
        ways.append(found is not None)
        return found

    monkeypatch.setattr(hydralora.tuner.linear, "one_token", watched)
    return ways


@contextmanager
def other_way() -> Iterator[None]:
    """Without the way for one token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydralora.tuner.linear, "one_token", lambda *args: None)
        yield


def only_layer(model: nn.Module) -> HydraLoraLayer:
    return next(iter(hydralora_layers(model).values()))


KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "float32": ({}, torch.float32),
    "eight experts": ({"lora_nums": 8}, torch.float32),
    "temperature": ({"router_temperature": 2.0}, torch.float32),
    "bfloat16": ({}, torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_same_numbers(kind: str, context: Callable[[], Any], taken: list[bool]) -> None:
    """To the last bit, of the same products in the same order."""
    changes, dtype = KINDS[kind]
    layer = only_layer(adapted(**changes).to(dtype))
    for shape in ((1, 1, 32), (1, 32)):
        x = torch.randn(shape, dtype=dtype)
        with context():
            found = layer(x)
            with other_way():
                assert torch.equal(layer(x), found)
            assert not torch.equal(layer.base_layer(x), found)
    assert taken == [True, True]


def test_generated_tokens(taken: list[bool]) -> None:
    model = adapted()
    options = {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False}
    found = model.generate(**options)
    assert taken.count(True) == 3 * 8  # all after the first one, in every layer
    with other_way():
        assert torch.equal(model.generate(**options), found)


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "another tensor": lambda weight: setattr(weight, "data", weight.data * 2),
    "an array that shares it": lambda weight: weight.detach().numpy().__imul__(2),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("part", ["lora_A", "lora_router", "lora_B"])
def test_a_weight_that_was_written_acts(part: str, write: str, taken: list[bool]) -> None:
    """Nothing is kept of it from one call to the next, however it is written."""
    layer, x = only_layer(adapted()), torch.randn(1, 1, 32)
    before = layer(x)
    WRITES[write](getattr(layer, part)["default"].weight)
    after = layer(x)
    with other_way():
        assert torch.equal(layer(x), after)
    assert not torch.equal(before, after)
    assert taken == [True, True]


def hooked(model: PeftModel) -> Any:
    """As offloading and sharding bring weights in."""
    part = only_layer(model).lora_A["default"]
    part.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return nullcontext()


def put_on(model: PeftModel) -> Any:
    """As accelerate does."""
    part = only_layer(model).lora_B["default"]
    forward = part.forward
    part.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2
    return nullcontext()


def parametrized(model: PeftModel) -> Any:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(only_layer(model).lora_router["default"], "weight", Double())
    return nullcontext()


def observed(model: PeftModel) -> Any:
    only_layer(model).observers.append(lambda routing: None)
    return nullcontext()


def in_training(model: PeftModel) -> Any:
    model.train()
    return nullcontext()


def dropout_in_training(model: PeftModel) -> Any:
    """As for draws at inference; here it drops next to nothing, so that the numbers can be compared."""
    dropout = only_layer(model).lora_dropout["default"]
    dropout.train()
    dropout.p = 1e-9
    return nullcontext()


def of_another_class(model: PeftModel) -> Any:
    class Doubled(type(only_layer(model).lora_A["default"])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 2

    only_layer(model).lora_A["default"].__class__ = Doubled
    return nullcontext()


REFUSED: dict[str, tuple[dict[str, Any], Callable[[PeftModel], Any]]] = {
    "hooks": ({}, hooked),
    "a forward of its own": ({}, put_on),
    "a computed weight": ({}, parametrized),
    "observers": ({}, observed),
    "training": ({}, in_training),
    "dropout in training": ({}, dropout_in_training),
    "another class": ({}, of_another_class),
    "a forced routing": ({}, lambda model: forced_routing(model, expert=1)),
    "autocast": ({}, lambda model: torch.autocast("cpu", torch.bfloat16)),
    "the best experts": ({"top_k": 1}, lambda model: nullcontext()),
    "one expert": ({"lora_nums": 1}, lambda model: nullcontext()),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_what_takes_the_other_way(case: str, taken: list[bool]) -> None:
    """With its own numbers: those of the plain layer differ, where the case changes any."""
    changes, prepare = REFUSED[case]
    model, x = adapted(**changes), torch.randn(1, 1, 32)
    plain = adapted()
    with prepare(model):
        found = only_layer(model)(x)
        with other_way():
            assert torch.equal(only_layer(model)(x), found)
    assert taken == [False]
    if case not in ("observers", "training", "dropout in training"):
        assert not torch.equal(only_layer(plain)(x), found)
        assert taken == [False, True]


@torch.no_grad()
def test_several_adapters_and_their_scale(taken: list[bool]) -> None:
    model, x = adapted(), torch.randn(1, 1, 32)
    torch.manual_seed(5)
    other = {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model.add_adapter("other", HydraLoraConfig(r=2, lora_nums=4, init_weights=False, **other))
    model.base_model.set_adapter(["default", "other"])
    layer = only_layer(model)
    with rescale(model, 0.5):
        found = layer(x)
        with other_way():
            assert torch.equal(layer(x), found)
    assert taken == [True, True]
    assert not torch.equal(layer(x), found)


def test_several_tokens_and_gradients(taken: list[bool]) -> None:
    layer = only_layer(adapted())
    with torch.no_grad():
        layer(torch.randn(1, 2, 32))
        layer(torch.randn(2, 1, 32))
    assert taken == [False, False]
    layer(torch.randn(1, 1, 32)).sum().backward()
    assert taken == [False, False], "not even asked"
