"""Budgets, averages against published numbers, shares of a total, and costs by formula."""

from __future__ import annotations

import random

import pytest

from dynamic.flops import DECODERS, Decoder
from dynamic.rules.budget import Keep, average, largest_remainder, solve_average
from dynamic.rules.costs import PlanCost, ranges, table, tokens_per_layer
from dynamic.rules.dart import DartRule
from dynamic.rules.fastv import FastVRule
from dynamic.rules.pyramiddrop import PyramidDropRule
from dynamic.rules.rule import LayerRule
from dynamic.rules.sparsevlm import SparseVlmRule
from llava.errors import FlagError


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("0.25", 0.25, "share"),
        (" 0.25 ", 0.25, "share"),
        ("1.0", 1.0, "share"),
        ("1", 1, "count"),
        ("128", 128, "count"),
        ("avg:128", 128, "average"),
        ("avg:63.5", 63.5, "average"),
    ],
)
def test_budgets(text: str, value: float, kind: str) -> None:
    keep = Keep.parse(text)
    assert (keep.value, keep.kind) == (value, kind)
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.0", "1.5", "-1", "half", "25%", "128.5", "avg:", "avg:0", "avg:0.25", "avg: 128", ".5", "1e2", "nan"],
)
def test_budgets_that_are_refused(text: str) -> None:
    with pytest.raises(FlagError, match=f"--keep {text}"):
        Keep.parse(text)


@pytest.mark.parametrize(
    ("text", "tokens", "count"),
    [
        ("0.25", 576, 144),
        ("0.3", 9, 2),
        ("0.01", 9, 1),
        ("1.0", 9, 9),
        ("128", 576, 128),
        ("128", 64, 64),
        ("1", 9, 1),
    ],
)
def test_how_many_stay(text: str, tokens: int, count: int) -> None:
    assert Keep.parse(text).count(tokens) == count


def test_an_average_is_no_number() -> None:
    with pytest.raises(ValueError, match="solve_average"):
        Keep.parse("avg:128").count(576)


def by_hand(tokens: int, counts: list[int], starts: list[int], layers: int) -> float:
    total = 0
    for layer in range(layers):
        passed = [count for count, start in zip(counts, starts, strict=True) if start <= layer]
        total += passed[-1] if passed else tokens
    return total / layers


@pytest.mark.parametrize(
    ("counts", "starts", "layers"),
    [([5], [2], 32), ([5], [0], 8), ([9, 4, 2], [2, 8, 16], 32), ([9, 4], [0, 7], 8), ([3], [31], 32)],
)
def test_averages_layer_by_layer(counts: list[int], starts: list[int], layers: int) -> None:
    expected = by_hand(20, counts, starts, layers)
    assert average(20, counts, starts, layers) == expected
    image = tokens_per_layer(20, counts, starts, layers)
    assert PlanCost(Decoder(8, layers, 20, 4, 8), image).average == expected


@pytest.mark.parametrize(
    ("rule", "layer", "wanted", "keep"),
    [
        (FastVRule(), 2, 192, 166),
        (FastVRule(), 2, 128, 98),
        (FastVRule(), 2, 64, 30),
        (DartRule(), 2, 128, 98),
        (FastVRule(), 3, 192, 152),
        (FastVRule(), 3, 128, 82),
        (FastVRule(), 3, 64, 11),
    ],
)
def test_published_counts_of_an_average(rule: LayerRule, layer: int, wanted: int, keep: int) -> None:
    assert solve_average(wanted, 576, lambda last: rule.counts(last, 576, [layer]), [layer], 32) == keep
    off = {last: abs(average(576, [last], [layer], 32) - wanted) for last in range(1, 577)}
    assert min(off, key=off.__getitem__) == keep


def exact_lambda(wanted: float) -> float:
    """Of stages before layers 2, 8 and 16 without rounding, by halves."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        kept = [576 * middle**stage for stage in range(4)]
        reached = (2 * kept[0] + 6 * kept[1] + 8 * kept[2] + 16 * kept[3]) / 32
        low, high = (middle, high) if reached < wanted else (low, middle)
    return low


@pytest.mark.parametrize(("wanted", "published"), [(192, 0.560), (128, 0.420), (64, 0.192)])
def test_published_lambdas(wanted: int, published: float) -> None:
    rule, starts = PyramidDropRule(), (2, 8, 16)
    last = solve_average(wanted, 576, lambda keep: rule.counts(keep, 576, starts), starts, 32)
    assert exact_lambda(wanted) == pytest.approx(published, abs=1e-3)
    # One token more or less of the last stage is up to 0.015 of lambda.
    assert [round(576 * published**3), (last / 576) ** (1 / 3)] == [last, pytest.approx(published, abs=2e-3)]


def test_late_pyramids_do_not_reach_less_than_a_quarter() -> None:
    rule, starts = PyramidDropRule(), PyramidDropRule.layers

    def solve(wanted: float) -> int:
        return solve_average(wanted, 576, lambda keep: rule.counts(keep, 576, starts), starts, 32)

    assert average(576, [0, 0, 0], starts, 32) == 144
    for wanted in (128, 144, 163):
        with pytest.raises(FlagError, match=r"163\.5 to 576"):
            solve(wanted)
    assert solve(164) == 1
    assert solve(576) == 576


def test_of_two_averages_as_near_the_lower_one() -> None:
    assert [solve_average(wanted, 10, lambda keep: [keep], [1], 2) for wanted in (7.5, 7.75, 7.8, 10)] == [5, 5, 6, 10]


@pytest.mark.parametrize(
    ("last", "counted_full", "counted_cut"), [(118, 207, 192), (60, 144, 128), (20, 82, 64)], ids=str
)
def test_two_averages_of_sparsevlm(last: int, counted_full: int, counted_cut: int) -> None:
    """The layer that is cut counted in full, and as if it were shorter already, as the published tables do."""
    rule = SparseVlmRule()
    counts = rule.counts(last, 576, rule.layers)
    assert average(576, counts, rule.layers, 32) == pytest.approx(counted_full, abs=0.6)
    assert average(576, counts, [layer - 1 for layer in rule.layers], 32) == pytest.approx(counted_cut, abs=1)


def test_averages_that_are_out_of_reach() -> None:
    """Too few are refused; too many keep everything, as a number of tokens does, since images differ in size."""
    with pytest.raises(FlagError, match=r"avg:0.5.*\[2\] of 32"):
        solve_average(0.5, 576, lambda keep: [keep], [2], 32)
    assert [solve_average(wanted, 576, lambda keep: [keep], [2], 32) for wanted in (576, 576.5, 1000)] == [576] * 3


def test_what_is_shared_out_adds_up() -> None:
    """The sum is exact, nobody gets more than fits, and no part is a whole token off where all shares fit."""
    draw = random.Random(0)
    for _ in range(400):
        number = draw.randint(1, 8)
        sizes = [draw.randint(0, 30) for _ in range(number)]
        weights = [draw.choice([0.0, 0.0, draw.random(), float(draw.randint(1, 5))]) for _ in range(number)]
        total = draw.randint(0, sum(sizes) + 5)
        given = largest_remainder(weights, sizes, total)
        assert sum(given) == min(total, sum(sizes)), (weights, sizes, total)
        assert all(0 <= part <= size for part, size in zip(given, sizes, strict=True))
        mass = sum(weights)
        if mass and all(total * weight / mass <= size for weight, size in zip(weights, sizes, strict=True)):
            assert all(
                abs(part - total * weight / mass) < 1 + 1e-9 for part, weight in zip(given, weights, strict=True)
            )
        assert largest_remainder(weights, sizes, total) == given


@pytest.mark.parametrize(
    ("weights", "sizes", "total", "expected"),
    [
        ([1, 1, 1], [9, 9, 9], 4, [2, 1, 1]),  # equal remainders: the first
        ([0, 0], [9, 9], 5, [3, 2]),  # nothing to go by
        ([0, 1], [9, 3], 5, [2, 3]),  # a weight of zero takes what no other can
        ([0.5, 0.3, 0.2], [99, 99, 99], 10, [5, 3, 2]),
        ([5, 3, 2], [99, 99, 99], 11, [6, 3, 2]),  # 5.5, 3.3, 2.2
        ([5.1, 3.9, 1], [99, 99, 99], 10, [5, 4, 1]),  # the larger remainder, not the larger weight
        ([8, 1, 1], [2, 9, 9], 8, [2, 3, 3]),  # what does not fit is shared out again
        ([1], [0], 3, [0]),
        ([], [], 3, []),
    ],
)
def test_shares(weights: list[float], sizes: list[int], total: int, expected: list[int]) -> None:
    assert largest_remainder(weights, sizes, total) == expected


TINY = Decoder(width=8, layers=4, inner_width=20, kv_width=4, query_width=8)


def test_costs_by_hand() -> None:
    image = tokens_per_layer(10, [6, 3], [1, 3], 4)
    assert image == (10, 6, 6, 3)
    cost = PlanCost(TINY, image, text=5)
    assert cost.average == 6.25
    flops = 0
    for tokens in (15, 11, 11, 8):
        flops += 4 * tokens * 8 * 8 + 4 * tokens * 8 * 4 + 4 * tokens * tokens * 8 + 6 * tokens * 8 * 20
    assert cost.flops == flops
    assert cost.cache_bytes == 2 * 2 * 4 * (15 + 11 + 11 + 8)
    assert PlanCost(TINY, image, 5, bytes_per_value=4).cache_bytes == 2 * cost.cache_bytes
    with pytest.raises(ValueError, match="3 layers for a decoder of 4"):
        PlanCost(TINY, (1, 2, 3))


def test_half_a_megabyte_a_token() -> None:
    """LLaVA-1.5-7B in 16 bit: 2 x 32 x 4096 x 2 bytes."""
    assert PlanCost(DECODERS["7b"], (1,) * 32).cache_bytes == 2**19


def test_layers_as_text() -> None:
    assert ranges((576, 576, 166)) == "576 (0-1), 166 (2)"
    assert ranges((5,)) == "5 (0)"
    assert ranges((4, 4, 4)) == "4 (0-2)"
    assert ranges((3, 1, 3)) == "3 (0), 1 (1), 3 (2)"


def test_the_table() -> None:
    plans = {"none": (10, 10, 10, 10), "fastv:0.3@2": tokens_per_layer(10, [3], [2], 4)}
    lines = table(TINY, plans, text=5).splitlines()
    assert lines[0].split() == ["plan", "average", "TFLOPs", "cache", "MiB", "image", "tokens", "(layers)"]
    assert lines[1].split()[:2] == ["none", "10.0"]
    assert "100.0%" in lines[1]
    assert lines[2].endswith("10 (0-1), 3 (2-3)")
    share = (2 * 15 + 2 * 8) / (4 * 15)
    assert f"{share:.1%}" in lines[2]
    assert "4 N C Q + 4 N C K + 4 N N Q + 6 N C I; C 8, K 4, Q 8, I 20" in lines[3]
    assert "paper" in table(TINY.paper(), plans).splitlines()[3]
