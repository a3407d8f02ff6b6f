"""Experts that are computed one by one: the numbers of the dense product, where that is used, and by every process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydralora.layer import weighted_experts
from hydralora.tuner import sparse
from hydralora.tuner.routing.rule import Rule
from tests.hydralora.tuner.models import IDS, MASK, adapted

pytestmark = pytest.mark.versions

E, RANK, OUT = 64, 2, 7
SHAPES = {"tokens": ((2, 9), (2, 9)), "flat": ((11,), (11,)), "of sequences": ((3, 5), (3, 1)), "one": ((1, 1), (1, 1))}
"""Of the code and of the weights."""


def drawn(shape: tuple[int, ...], of_weights: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(*of_weights, E, requires_grad=True)
    return torch.randn(*shape, RANK, requires_grad=True), torch.randn(OUT, E * RANK, requires_grad=True), logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", [Rule("token", top_k=1), Rule("token", top_k=3), Rule("token", top_p=0.1)], ids=str)
@pytest.mark.parametrize("onto", [None, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_the_dense_product(shape: str, rule: Rule, onto: Any) -> None:
    found = []
    for compute in (weighted_experts, sparse.grouped_experts):
        code, matrix, logits = drawn(*SHAPES[shape])
        base = None if onto is None else torch.randn(*code.shape[:-1], OUT, generator=torch.manual_seed(1)).to(onto)
        output = compute(code, matrix, rule.weights(torch.softmax(logits, -1)), 0.5, base)
        assert output.shape == (*code.shape[:-1], OUT)
        assert output.dtype is (onto or torch.float32)
        (output.float() * torch.arange(OUT)).sum().backward()
        found.append((output, code.grad, matrix.grad, logits.grad))
        with torch.no_grad():
            torch.testing.assert_close(
                compute(code, matrix, rule.weights(torch.softmax(logits, -1)), 0.5, base), output, rtol=0, atol=1e-5
            )
    tolerance = {} if onto is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for dense, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, dense, **tolerance)
    assert found[0][2].any()


def test_where_it_is_used() -> None:
    code, few = torch.randn(20, RANK), torch.zeros(20, E)
    few[:, 3] = 1
    assert sparse.pays(code, few)
    assert not sparse.pays(code, few + 0.1), "all experts act"
    assert not sparse.pays(code, few[:, :16]), "few experts"
    assert not sparse.pays(code[:1], few[:1, :32]), "few tokens"
    few[:, 4:6] = 1
    assert not sparse.pays(code, few), "three of 64, with gradients"
    with torch.no_grad():
        assert sparse.pays(code, few)
    few[:, 4:6] = 0
    assert not sparse.pays(code.bfloat16(), few)
    assert not sparse.pays(code[:0], few[:0])
    assert not sparse.pays(code.to("meta"), few)
    with torch.autocast("cpu"):
        assert not sparse.pays(code, few)
    assert torch.func.vmap(lambda c, w: torch.tensor(sparse.pays(c, w)))(code[None], few[None]).tolist() == [False]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_layer_uses_it_and_every_process_calls_the_same_modules(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its tokens are routed to, so that what splits weights over processes never waits for one of them."""
    calls: list[int] = []
    compute = sparse.grouped_experts

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return compute(*args)

    model = adapted(lora_nums=E, top_k=1).train(training)
    called: list[list[str]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called[-1].append(name))
    outputs = []
    for grouped in (counted, None):
        if grouped is None:
            monkeypatch.setattr(sparse, "pays", lambda code, weights: False)
        else:
            monkeypatch.setattr(sparse, "grouped_experts", grouped)
        for ids in (IDS, IDS.flip(1)):
            called.append([])
            outputs.append(model(input_ids=ids, attention_mask=MASK, labels=ids))
    assert len(calls) == 2 * 8
    assert all(each == called[0] for each in called)
    torch.testing.assert_close(outputs[0].logits, outputs[2].logits, rtol=0, atol=1e-5)
    assert not torch.allclose(outputs[0].logits, outputs[1].logits)
    if training:
        outputs[0].loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []


def test_what_a_call_forces_is_computed_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of zero that a call gives has a gradient, unlike one that a rule has chosen."""
    monkeypatch.setattr(sparse, "grouped_experts", pytest.fail)
    model = adapted(lora_nums=E, top_k=1)
    weights = nn.functional.one_hot(torch.tensor(3), E).float().requires_grad_()
    model(input_ids=IDS, routing_weights=weights, labels=IDS).loss.backward()
    assert weights.grad is not None
    assert int((weights.grad != 0).sum()) == E
