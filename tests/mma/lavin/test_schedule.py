"""The learning rate of LaVIN, equal to the original at every fraction of an epoch; decoding by nucleus sampling."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from llava.eval.answering.generation import GenerationOptions, RowSampler
from mma.lavin.schedule import Epoch, Schedule, absolute_learning_rate, lavin_schedule
from tests.golden import load_case

SETTINGS = load_case("lavin", "lr_schedule")[0]["settings"]
TOP_P, TOP_P_TENSORS = load_case("lavin", "top_p")


def schedule_of(case: dict[str, Any]) -> Schedule:
    rate = absolute_learning_rate(case["blr"], case["batch_size"], case["accum_iter"], case["world_size"])
    assert rate == pytest.approx(case["absolute_lr"], rel=1e-12)
    return Schedule(rate, case["epochs"], case["warmup_epochs"], case["min_lr"])


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case["name"])
def test_rates(case: dict[str, Any]) -> None:
    schedule = schedule_of(case)
    found = [schedule.at(epoch) for epoch in case["fractional_epoch"]]
    assert found == pytest.approx(case["lr"], rel=1e-9, abs=1e-18)


def test_the_schedule_of_torch_gives_the_rate_at_the_begin_of_each_update() -> None:
    """Three batches in groups of two: one update in an epoch; a second group keeps its ratio to the first."""
    epoch, schedule = Epoch(batches=7, accum_iter=2), Schedule(0.2, epochs=4, warmup_epochs=1, min_lr=0.01)
    assert epoch.updates == 3
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.05}], lr=0.2)
    scheduler = lavin_schedule(optimizer, schedule, epoch)
    seen = []
    for _ in range(epoch.updates * 4):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1] == pytest.approx(rates[0] / 4)
        seen.append(rates[0])
        optimizer.step()
        scheduler.step()
    begins = [whole + iteration / 7 for whole in range(4) for iteration in (0, 2, 4)]
    assert seen == pytest.approx([schedule.at(begin) for begin in begins])
    assert seen[0] == 0
    assert max(seen) == pytest.approx(0.2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)  # at the end


class Even:
    """In place of a random stream: one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize("name", [name for name in TOP_P_TENSORS if name.startswith("out/kept_sorted_probs")])
def test_nucleus_sampling_keeps_the_same_tokens(name: str) -> None:
    """What is drawn at evenly spread numbers: every token as often as the original's probabilities say, to one draw."""
    temperature, mass = map(float, re.findall(r"[\d.]+", name))
    draws = 2000
    keys = [str(number) for number in range(draws)]
    for row, logits in enumerate(TOP_P_TENSORS["in/logits"]):
        sampler = RowSampler(GenerationOptions(temperature, mass), keys)
        sampler.streams = [Even((number + 0.5) / draws) for number in range(draws)]
        drawn = sampler(torch.zeros(draws, 1), logits.expand(draws, -1)).argmax(-1)  # (draws,)
        share = torch.bincount(drawn, minlength=len(logits))[TOP_P_TENSORS["out/sorted_index"][row]] / draws
        expected = TOP_P_TENSORS[name][row]
        assert torch.equal(share > 0, expected > 0)
        torch.testing.assert_close(share, expected, rtol=0, atol=1 / draws)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_a_nucleus_of_0_keeps_the_best_token(temperature: float) -> None:
    """The original masks what lies behind a mass of more than `top_p`: in front of the best token lies none."""
    options = GenerationOptions(temperature, top_p=0.0)
    assert options.arguments(["a"]) == {"num_beams": 1, "max_new_tokens": 128, "do_sample": False}
    for logits in TOP_P_TENSORS["in/logits"]:
        probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
        kept = order[probabilities.cumsum(-1) - probabilities <= 0.0]
        assert kept.tolist() == [int(logits.argmax())]
        drawn = RowSampler(options, ["a", "b", "c"])(torch.zeros(3, 1), logits.expand(3, -1)).argmax(-1)
        assert drawn.tolist() == [int(logits.argmax())] * 3
