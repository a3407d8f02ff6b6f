"""A budget shared out among tiles: by largest remainder, and in HiRED by what the image in small attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from dynamic.rules.budget import largest_remainder
from dynamic.rules.hired import HiredRule
from dynamic.rules.regions import WHOLE, tile_regions
from tests.dynamic.rules import slow_rules
from tests.dynamic.rules.views import PlainView, random_view


@pytest.mark.parametrize(
    ("weights", "sizes", "total", "shares"),
    [
        ([1, 1], [9, 9], 5, [3, 2]),  # equal remainders: the first
        ([3, 3, 4, 3], [9, 9, 9, 9], 4, [1, 1, 1, 1]),  # 0.92 three times, and 1.23
        ([0.1, 0.2, 0.7], [9, 9, 9], 10, [1, 2, 7]),
        ([5, 1, 1], [3, 9, 9], 9, [3, 3, 3]),  # what the first cannot take goes to the others in proportion
        ([1, 0, 0], [3, 9, 9], 6, [3, 2, 1]),  # to those without weight last, equally
        ([0, 0, 0], [9, 9, 9], 7, [3, 2, 2]),
        ([1, 1], [2, 3], 9, [2, 3]),
        ([1, 2], [4, 0], 3, [3, 0]),
        ([], [], 3, []),
    ],
)
def test_largest_remainder(weights: Sequence[float], sizes: Sequence[int], total: int, shares: list[int]) -> None:
    assert largest_remainder(weights, sizes, total) == shares


def test_largest_remainder_is_within_one_of_the_exact_share() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.rand(5, generator=draw).tolist()
        total = int(torch.randint(1, 100, (), generator=draw))
        shares = largest_remainder(weights, [100] * 5, total)
        assert sum(shares) == total
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1


@pytest.mark.parametrize(
    ("grid", "size", "first", "last"),
    [
        ((2, 2), (500, 500), (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
        ((1, 2), (336, 672), (0, 0, 0.5, 1), (0.5, 0, 1, 1)),
        ((2, 2), (800, 400), (-0.5, 0, 0.5, 0.5), (0.5, 0.5, 1.5, 1)),  # as high as one tile, in the middle of two
        ((2, 1), (100, 100), (0, -0.5, 1, 0.5), (0, 0.5, 1, 1.5)),
    ],
)
def test_regions(grid: tuple[int, int], size: tuple[int, int], first: Sequence[float], last: Sequence[float]) -> None:
    regions = tile_regions(grid, 336, size)
    assert len(regions) == 1 + grid[0] * grid[1]
    assert regions[0] == WHOLE
    assert regions[1] == pytest.approx(first)
    assert regions[-1] == pytest.approx(last)


def tiles_of(seed: int) -> list[PlainView]:
    """An image of 2 : 1 in 2 x 2 tiles, with padding above and below."""
    early = torch.rand(36, generator=torch.Generator().manual_seed(seed)) ** 4
    view = replace(random_view(6, 6, seed), received_early=early)
    return [replace(view, region=region) for region in tile_regions((2, 2), 84, (200, 100))]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("keep", "alpha"), [(41, 0.5), (30, 0.3), (17, 0.75)])
def test_quotas_go_by_early_attention(seed: int, keep: int, alpha: float) -> None:
    tiles = tiles_of(seed)
    assert HiredRule(alpha=alpha).quotas(tiles, [36] * 5, keep) == slow_rules.hired_quotas(tiles, keep, alpha)


def test_quotas_are_exact_for_every_budget() -> None:
    sizes, tiles = [36, 12, 12, 36, 5], tiles_of(0)
    for keep in range(1, sum(sizes)):
        quotas = HiredRule().quotas(tiles, sizes, keep)
        assert sum(quotas) == keep
        assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))


def test_quotas_follow_what_the_image_in_small_attends_to() -> None:
    tiles = tiles_of(0)
    corner = ((tiles[0].places[:, 0] >= 3) & (tiles[0].places[:, 1] < 3)).float()  # lower left
    looking = [replace(tiles[0], received_early=corner), *tiles[1:]]
    assert HiredRule().quotas(looking, [36] * 5, 18) == [9, 0, 0, 9, 0]
    assert HiredRule().quotas(looking[:1], [36], 18) == [18]


def test_quotas_go_by_size_where_nothing_says_what_tiles_show() -> None:
    tiles = tiles_of(0)
    assert HiredRule().quotas(tiles[1:], [36] * 4, 18) == [5, 5, 4, 4]
    assert HiredRule().quotas([tiles[0], replace(tiles[1], region=None)], [36, 12], 8) == [6, 2]
