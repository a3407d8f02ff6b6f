"""What holds for every rule that is registered: a row never depends on its neighbors, and nothing is approximated."""

from __future__ import annotations

import re

import pytest
import torch

import tests.dynamic.rules.example_rules  # noqa: F401  # two more rules
from dynamic.rules.handle import reduced
from dynamic.rules.registry import rules
from dynamic.rules.rule import LayerRule
from tests.dynamic.rules.reduced_models import PATCHES, batch_of, logits_of, long_way, prompts, tiny_llava
from tests.dynamic.rules.table import table, written

NEAR = {"atol": 2e-5, "rtol": 0}


def plans() -> list[str]:
    """Every rule by itself, each with its modifiers, and rules one after another; for three decoder layers."""
    found = []
    for name, rule in rules().items():
        place = ("@1,2" if len(rule.layers) > 1 else "@1") if issubclass(rule, LayerRule) else ""
        found += [f"{name}:0.3{place}", *(f"{name}+{modifier}:0.3{place}" for modifier in rule.modifiers)]
        found.append(f"{name}:avg:{PATCHES * 3 // 4}{place}")
    return [*found, "example-neighbors:0.7+example-last-row:0.3@1", "example-last-row:0.2@1,2"]


@pytest.fixture(params=plans())
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_readme_has_the_rules_of_the_code() -> None:
    assert written() == table()


def test_a_row_alone_is_what_explicit_masks_give(plan: str) -> None:
    for row in prompts():
        expected = long_way(row, plan)
        found = logits_of(batch_of([row]), plan, new=1)
        torch.testing.assert_close(found[:, 0], expected.logits, **NEAR)
        if "avg:" in plan:
            average = PATCHES * 3 // 4 * len(row.images)
            assert abs(sum(expected.kept) / len(expected.kept) - average) <= len(row.images)
        else:
            share = float(re.findall(r"0\.\d", plan)[-1])
            assert expected.kept[-1] == int(share * PATCHES) * len(row.images)


def test_a_row_does_not_depend_on_its_neighbors(plan: str) -> None:
    rows = list(prompts())
    together = logits_of(batch_of(rows), plan)
    backwards = logits_of(batch_of(rows[::-1], side="right"), plan).flip(0)
    for number, row in enumerate(rows):
        alone = logits_of(batch_of([row]), plan)
        torch.testing.assert_close(together[number : number + 1], alone, **NEAR)
        torch.testing.assert_close(backwards[number : number + 1], alone, **NEAR)
        torch.testing.assert_close(logits_of(batch_of([row], extra=3), plan), alone, **NEAR)


def test_with_cache_is_without(plan: str) -> None:
    batch = batch_of(list(prompts()))
    torch.testing.assert_close(logits_of(batch, plan, use_cache=False), logits_of(batch, plan), **NEAR)


def test_beams_of_a_row_do_not_depend_on_its_neighbors(plan: str) -> None:
    model, rows = tiny_llava(), list(prompts())
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 5}

    def beams(number: int | None) -> torch.Tensor:
        batch = batch_of(rows if number is None else [rows[number]])
        return model.generate(**batch._asdict(), extensions=reduced(model, plan), min_new_tokens=5, **options)

    together = beams(None)
    for number in range(len(rows)):
        assert torch.equal(together[3 * number : 3 * number + 3], beams(number))
