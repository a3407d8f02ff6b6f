"""Dropout that differs by expert: off in evaluation, right on average, and beginning when it should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from hydralora import set_step
from hydralora.tuner.balance.trainer import AdapterCallback
from hydralora.tuner.head_dropout import HeadDropout
from hydralora.tuner.parts import Experts
from tests.hydralora.tuner.models import adapted, logits

pytestmark = pytest.mark.versions

KINDS: list[dict[str, float]] = [{"head_dropout": 0.3}, {"expert_dropout": 0.3}]
EACH = pytest.mark.parametrize("kind", KINDS, ids=str)


def made(heads: float = 0.0, experts: float = 0.0, count: int = 3) -> Experts:
    torch.manual_seed(0)
    return Experts(2, 5, count, identity=False, head_dropout=HeadDropout(heads, experts))


@EACH
def test_evaluation_is_as_without_it(kind: dict[str, float]) -> None:
    with_it, without = adapted(**kind), adapted()
    assert torch.equal(logits(with_it), logits(without))
    torch.manual_seed(0)
    first, second = logits(with_it.train()), logits(with_it)
    assert not torch.allclose(first, second), "the negative control: training draws masks"
    assert torch.equal(logits(without.train()), logits(without))


@pytest.mark.parametrize("options", [{"heads": 0.4}, {"experts": 0.4}, {"heads": 0.2, "experts": 0.2}], ids=str)
def test_the_mean_over_masks_is_the_value_of_evaluation(options: dict[str, float]) -> None:
    """Within four standard errors of 20000 masks; without the division by 1 - p it would be far off."""
    experts = made(**options)
    code, weights = torch.randn(2), torch.tensor([0.2, 0.5, 0.3])
    expected = experts.eval()(code, weights, 1.5)
    many = experts.train()(code.expand(20000, 2), weights.expand(20000, 3), 1.5)
    error = many.std(dim=0) / 20000**0.5
    assert ((many.mean(dim=0) - expected).abs() < 4 * error + 1e-6).all()
    assert ((many.mean(dim=0) * (1 - max(options.values())) - expected).abs() > 4 * error).any()


def test_masks_are_of_each_expert_and_of_whole_experts() -> None:
    code, weights = torch.ones(4000, 2), torch.full((4000, 3), 1 / 3)
    heads = HeadDropout(heads=0.5).weighted_code(code, weights).view(-1, 3, 2).bool()
    whole = HeadDropout(experts=0.5).weighted_code(code, weights).view(-1, 3, 2).bool()
    assert 0.2 < (heads[..., 0] == heads[..., 1]).float().mean() < 0.6, "numbers drop by themselves"
    assert (whole[..., 0] == whole[..., 1]).all()
    for mask in (heads[..., 0], whole[..., 0]):  # (tokens, E)
        assert 0.45 < mask.float().mean() < 0.55
        assert 0.4 < (mask[:, 0] == mask[:, 1]).float().mean() < 0.6, "experts drop by themselves"


def test_gradients_are_those_of_the_masks() -> None:
    """A dropped expert gets no gradient, and the router sees the kept ones alone."""
    torch.manual_seed(1)
    experts = made(experts=0.5).train()
    code, weights = torch.randn(1, 2), torch.full((1, 3), 1 / 3, requires_grad=True)
    experts(code, weights).square().sum().backward()
    assert experts.weight.grad is not None
    assert weights.grad is not None
    trained = experts.weight.grad.view(5, 3, 2).abs().amax(dim=(0, 2)) > 0
    assert 0 < trained.sum() < 3
    assert torch.equal(trained, weights.grad[0] != 0)


def test_weights_of_whole_sequences() -> None:
    experts = made(heads=0.5).train()
    assert experts(torch.randn(2, 4, 2), torch.full((2, 1, 3), 1 / 3)).shape == (2, 4, 5)


@EACH
def test_one_expert_stays_lora(kind: dict[str, float]) -> None:
    model, plain = adapted(lora_nums=1, **kind).train(), adapted(lora_nums=1).train()
    assert torch.equal(logits(model), logits(plain))


@EACH
def test_it_begins_after_some_updates(kind: dict[str, Any]) -> None:
    model, plain = adapted(head_dropout_start=2, **kind).train(), adapted().train()
    with pytest.raises(RuntimeError, match=r"head_dropout_start=2.*hydralora.set_step\(model, step\)"):
        logits(model)
    logits(copy.deepcopy(model).eval())  # evaluation needs no number
    differs = []
    for step in range(4):
        set_step(model, step)
        differs.append(not torch.equal(logits(model), logits(plain)))
    assert differs == [False, False, True, True]


def test_the_callback_hands_over_the_trainers_count_to_its_model_alone() -> None:
    """A resumed run begins with the count of the interrupted one."""
    model, other = (adapted(head_dropout=0.2, head_dropout_start=5) for _ in range(2))
    AdapterCallback().on_step_begin(None, TrainerState(global_step=7), TrainerControl(), model=model)
    steps = [
        {module.head_dropout.step for module in each.modules() if isinstance(module, Experts)}
        for each in (model, other)
    ]
    assert steps == [{7}, {None}]
    with pytest.raises(ValueError, match="step is -1"):
        set_step(model, -1)
