"""Losses on the routing of a layer: their values at the ends, their gradients, and which tokens count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hydralora.layer import expert_balance_loss, routing_of
from hydralora.tuner.balance.losses import (
    MovingShares,
    batch_balance,
    entropy,
    expert_shares,
    information,
    mean_routing,
    of_prompts,
    warmed_up,
)

E = 4
NAMED = {
    "even and undecided": torch.full((2, 6, E), 1 / E),
    "collapsed": torch.eye(E)[torch.zeros(2, 6, dtype=torch.long)],
    "one expert per sample": torch.eye(E)[torch.tensor([[0] * 6, [1] * 6])],
    "one expert per token, all used": torch.eye(E)[torch.arange(8).reshape(2, 4) % E],
}
EXPECTED = {  # batch balance; information
    "even and undecided": (1 / E, 0.0),
    "collapsed": (1.0, 0.0),
    "one expert per sample": (1 / 2, math.log(2)),
    "one expert per token, all used": (1 / E, math.log(E)),
}


def drawn(seed: int = 0, shape: tuple[int, ...] = (3, 5, E)) -> Tensor:
    torch.manual_seed(seed)
    return torch.softmax(2 * torch.randn(shape), dim=-1)


@pytest.mark.parametrize("name", NAMED)
def test_values_at_the_ends(name: str) -> None:
    balance, shared = EXPECTED[name]
    assert batch_balance(NAMED[name]).item() == pytest.approx(balance, abs=1e-6)
    assert information(NAMED[name]).item() == pytest.approx(shared, abs=1e-6)


def test_layers_that_collapsed_on_different_experts_are_not_balanced() -> None:
    """The sum over layers calls them even, which is the lowest value that it has; each layer by itself is collapsed."""
    layers = [torch.eye(E)[torch.full((2, 6), expert)] for expert in range(E)]
    pooled = expert_balance_loss([routing_of(layer) for layer in layers], None)
    assert pooled.item() == pytest.approx(1 / E)
    assert [batch_balance(layer).item() for layer in layers] == [1.0] * E


def test_samples_may_differ_in_a_batch() -> None:
    """The loss per sample is highest where every sample has an expert of its own, that over the batch lowest."""
    samples = torch.eye(E)[torch.arange(E).unsqueeze(1).expand(E, 5)]
    assert expert_balance_loss([routing_of(samples)], None).item() == pytest.approx(1.0)
    assert batch_balance(samples).item() == pytest.approx(1 / E)


@pytest.mark.parametrize("loss", [batch_balance, information], ids=["balance", "information"])
def test_only_real_tokens_count(loss: object) -> None:
    assert callable(loss)
    probabilities, mask = drawn(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    real = probabilities[mask.bool()]
    assert loss(probabilities, mask).item() == pytest.approx(loss(real).item(), abs=1e-6)
    changed = torch.where(mask.bool()[..., None], probabilities, drawn(1))
    assert loss(changed, mask).item() == pytest.approx(loss(probabilities, mask).item(), abs=1e-6)
    assert abs(loss(changed) - loss(probabilities)) > 1e-3, "the negative control"
    assert loss(probabilities, torch.zeros(3, 5)).item() == 0


def test_a_mask_of_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\) tokens are routed and the mask is of \(3, 4\)"):
        batch_balance(drawn(), torch.ones(3, 4))


def test_gradients() -> None:
    """Balance: dL/dp = F / tokens, where F has none. Information: that of the formula, finite at 0 and 1."""
    probabilities = drawn().requires_grad_()
    batch_balance(probabilities).backward()
    assert probabilities.grad is not None
    torch.testing.assert_close(probabilities.grad, (expert_shares(probabilities) / 15).expand(3, 5, E))
    torch.manual_seed(0)
    logits = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entropy(torch.softmax(z, -1)), logits)
    sharp = NAMED["one expert per sample"].clone().requires_grad_()
    information(sharp).backward()
    assert sharp.grad is not None
    assert torch.isfinite(sharp.grad).all()


def test_information_lets_routers_decide_and_differ() -> None:
    """Descent on its negative, from nearly even routers, ends at one expert per cluster; the balance loss stays."""
    torch.manual_seed(0)
    x = torch.eye(E).repeat(4, 1)
    ends = []
    for loss in (lambda p: -information(p), batch_balance):
        router = torch.nn.Linear(E, E, bias=False)
        torch.nn.init.normal_(router.weight, std=0.01)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            loss(torch.softmax(router(x), dim=-1)).backward()
            optimizer.step()
        ends.append(information(torch.softmax(router(x), dim=-1)).item())
    assert ends[0] > 0.9 * math.log(E)
    assert ends[1] < 0.1


def test_moving_shares_see_more_than_one_batch() -> None:
    """Single prompts, each with another expert: alone every one looks collapsed, over time they are even."""
    one = [torch.eye(E)[[expert]] for expert in range(E)]
    assert [batch_balance(each).item() for each in one] == [1.0] * E
    moving, values = MovingShares(0.9), []
    for step in range(80):
        probabilities = one[step % E]
        shares = moving.update("layer", expert_shares(probabilities))
        values.append(batch_balance(probabilities, shares=shares).item())
    assert values[0] == 1.0, "the first batch is all that is known"
    assert values[-1] == pytest.approx(1 / E, abs=0.06)
    alone = MovingShares(0.0)
    assert alone.update("layer", one[0][0]).tolist() == one[0][0].tolist()
    assert alone.update("layer", one[1][0]).tolist() == one[1][0].tolist()
    assert moving.update("other", one[1][0]).tolist() == one[1][0].tolist(), "every layer has its own"


def test_routing_by_sequence_is_balanced_by_prompts() -> None:
    """A long prompt counts as much as a short one."""
    probabilities = torch.eye(2)[torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])]
    prompt = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    assert of_prompts(probabilities, prompt).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert batch_balance(of_prompts(probabilities, prompt)).item() == 0.5
    assert batch_balance(probabilities, prompt).item() == pytest.approx((4 / 5) ** 2 + (1 / 5) ** 2)
    torch.testing.assert_close(of_prompts(drawn()), drawn().mean(dim=1))
    torch.testing.assert_close(mean_routing(drawn()), drawn().mean(dim=(0, 1)))


def test_warm_up() -> None:
    assert [warmed_up(0.5, step, 4) for step in (0, 1, 2, 4, 9)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert warmed_up(0.5, 0, 0) == 0.5
