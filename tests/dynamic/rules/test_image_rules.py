"""Rules in front of the decoder against plain formulas of their own, and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamic.rules.cdpruner import CDPrunerRule
from dynamic.rules.divprune import DivPruneRule
from dynamic.rules.grid import GridRule
from dynamic.rules.hired import HiredRule
from dynamic.rules.pool import PoolRule
from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.sampled import RandomRule
from dynamic.rules.scope import ScopeRule
from dynamic.rules.selection import Selection, best
from dynamic.rules.visionzip import VisionZipRule
from dynamic.rules.vispruner import VisPrunerRule
from llava.errors import FlagError
from tests.dynamic.rules import slow_rules
from tests.dynamic.rules.views import PlainView, random_view

RULES: dict[str, ImageRule] = {
    "random": RandomRule(),
    "grid": GridRule(),
    "pool": PoolRule(),
    "visionzip": VisionZipRule(),
    "visionzip,code": VisionZipRule(variant="code"),
    "visionzip,half": VisionZipRule(contextual=0.5),
    "visionzip,all": VisionZipRule(contextual=1.0, variant="code"),
    "hired": HiredRule(),
    "divprune": DivPruneRule(),
    "divprune+cen": DivPruneRule(cen=True),
    "scope": ScopeRule(),
    "scope,alpha": ScopeRule(alpha=0.3),
    "vispruner": VisPrunerRule(),
    "vispruner,step": VisPrunerRule(step=1),
    "cdpruner": CDPrunerRule(),
    "cdpruner+cen": CDPrunerRule(cen=True),
    "cdpruner,sign": CDPrunerRule(sign=1),
}

SLOW: dict[str, Callable[[PlainView, int], Sequence[int] | slow_rules.Weights]] = {
    "grid": slow_rules.grid,
    "pool": slow_rules.pool,
    "visionzip": slow_rules.visionzip,
    "visionzip,code": lambda view, keep: slow_rules.visionzip(view, keep, variant="code"),
    "visionzip,half": lambda view, keep: slow_rules.visionzip(view, keep, contextual=0.5),
    "visionzip,all": lambda view, keep: slow_rules.visionzip(view, keep, contextual=1.0, variant="code"),
    "hired": slow_rules.hired,
    "divprune": slow_rules.divprune,
    "divprune+cen": lambda view, keep: slow_rules.divprune(view, keep, cen=True),
    "scope": slow_rules.scope,
    "scope,alpha": lambda view, keep: slow_rules.scope(view, keep, alpha=0.3),
    "vispruner": slow_rules.vispruner,
    "vispruner,step": lambda view, keep: slow_rules.vispruner(view, keep, step=1),
    "cdpruner": slow_rules.cdpruner,
    "cdpruner+cen": lambda view, keep: slow_rules.cdpruner(view, keep, cen=True),
    "cdpruner,sign": lambda view, keep: slow_rules.cdpruner(view, keep, sign=1),
}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def chosen(rule: ImageRule, view: PlainView, keep: int) -> list[int]:
    return sorted(rule.select(view, keep).kept.tolist())


def as_matrix(weights: slow_rules.Weights, tokens: int) -> Tensor:
    """Weights (kept, n) in ascending order of the kept tokens."""
    matrix = torch.zeros(len(weights), tokens)
    for row, index in enumerate(sorted(weights)):
        for member, weight in weights[index].items():
            matrix[row, member] = weight
    return matrix


def test_every_rule_but_a_draw_has_a_slow_formula() -> None:
    assert set(RULES) - {"random"} == set(SLOW)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize(("rows", "columns", "keep"), [(4, 6, 1), (5, 5, 6), (4, 6, 13), (1, 9, 4), (6, 4, 23)])
def test_equals_its_slow_formula(name: str, rows: int, columns: int, keep: int) -> None:
    for seed in range(3):
        view = random_view(rows, columns, seed)
        selection = RULES[name].select(view, keep).ascending()
        expected = SLOW[name](view, keep)
        assert selection.kept.tolist() == sorted(expected)
        if isinstance(expected, dict) and selection.merge is not None:
            torch.testing.assert_close(selection.merge, as_matrix(expected, rows * columns))
        else:
            assert selection.merge is None
            assert not isinstance(expected, dict) or all(members == {i: 1.0} for i, members in expected.items())


@every_rule
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (7, 1), (4, 5)])
def test_keeps_exactly_what_was_asked_for(rule: ImageRule, rows: int, columns: int) -> None:
    view = random_view(rows, columns)
    for keep in range(1, rows * columns):
        rule.select(view, keep).check(rows * columns, keep, rule.name)


@every_rule
def test_keeps_exactly_what_was_asked_for_of_a_real_tile(rule: ImageRule) -> None:
    for keep in (64, 191):
        rule.select(random_view(24, 24), keep).check(576, keep, rule.name)


@every_rule
def test_keeps_exactly_what_was_asked_for_of_what_an_earlier_rule_left(rule: ImageRule) -> None:
    whole = random_view(6, 6)
    for seed in range(4):
        left = torch.randperm(36, generator=torch.Generator().manual_seed(seed))[:11].sort().values
        for keep in range(1, 11):
            rule.select(whole.part(left), keep).check(11, keep, rule.name)


@every_rule
def test_equal_tokens_are_no_trouble(rule: ImageRule) -> None:
    """All alike, and all zero: exact, and where only scores decide, the first ones."""
    view = random_view(4, 4)
    for value in (0.0, 1.0):
        same = {
            name: torch.full_like(getattr(view, name), value) for name in ("tower", "projected", "received", "keys")
        }
        for keep in (1, 5, 15):
            selection = rule.select(replace(view, **same), keep)
            selection.check(16, keep, rule.name)
            if rule.name in ("hired", "divprune", "cdpruner", "scope"):
                assert sorted(selection.kept.tolist()) == list(range(keep))
            assert selection.merge is None or bool(selection.merge.isfinite().all())


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_the_model_is(rule: ImageRule, dtype: torch.dtype) -> None:
    view = random_view(4, 6)
    low = {name: getattr(view, name).to(dtype) for name in ("tower", "projected", "question")}
    high = {name: tensor.float() for name, tensor in low.items()}
    ours, reference = rule.select(replace(view, **low), 9), rule.select(replace(view, **high), 9)
    assert ours.kept.tolist() == reference.kept.tolist()
    assert ours.merge is None or ours.merge.dtype == torch.float32


@every_rule
def test_the_same_image_gets_the_same_tokens(rule: ImageRule) -> None:
    view = random_view(5, 5)
    torch.manual_seed(1)
    first = rule.select(view, 7)
    torch.manual_seed(2)
    again = rule.select(view.part(torch.arange(25)), 7)
    assert first.kept.tolist() == again.kept.tolist()


@pytest.mark.parametrize(
    "name", [name for name in RULES if name.startswith(("hired", "divprune", "scope", "cdpruner"))]
)
def test_rules_that_look_at_tokens_alone_follow_them(name: str) -> None:
    """In another order the same tokens stay; of the others, `vispruner` and `visionzip` depend on raster order."""
    view = random_view(5, 6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    moved = order[RULES[name].select(view.part(order), 9).kept]
    assert sorted(moved.tolist()) == chosen(RULES[name], view, 9)


@pytest.mark.parametrize("keep", [2, 6, 9, 25])
def test_grid_and_pool_go_by_places(keep: int) -> None:
    """25 cells of 15 x 15 patches are 3 x 3, with one patch in the middle."""
    view = random_view(15, 15)
    order = torch.randperm(225, generator=torch.Generator().manual_seed(3))
    moved = PoolRule().select(view.part(order), keep)
    merge = torch.zeros(keep, 225).index_copy_(1, order, moved.merge)
    expected = PoolRule().select(view, keep)
    torch.testing.assert_close(merge, expected.merge, rtol=0, atol=0)
    if keep in (9, 25):
        assert sorted(order[moved.kept].tolist()) == chosen(GridRule(), view, keep)
    shifted = replace(view, places=view.places + 24)  # places of a tile in the middle of an image
    assert chosen(GridRule(), shifted, keep) == chosen(GridRule(), view, keep)


@pytest.mark.parametrize(
    ("rows", "columns", "lattice"), [(24, 24, (8, 8)), (24, 24, (12, 12)), (6, 12, (2, 4)), (1, 9, (1, 3))]
)
def test_pool_is_adaptive_pooling_where_sides_are_multiples(rows: int, columns: int, lattice: tuple[int, int]) -> None:
    view = random_view(rows, columns)
    selection = PoolRule().select(view, lattice[0] * lattice[1]).ascending()
    square = view.projected.T.unflatten(1, (rows, columns))  # (D, rows, columns)
    expected = F.adaptive_avg_pool2d(square, lattice).flatten(1).T
    torch.testing.assert_close(selection.merge @ view.projected, expected)


@pytest.mark.parametrize("keep", [1, 13, 64, 121, 128, 196, 400])
def test_every_patch_is_in_one_mean_and_cells_are_even(keep: int) -> None:
    merge = PoolRule().select(random_view(24, 24), keep).merge
    assert torch.equal((merge > 0).sum(dim=0), torch.ones(576, dtype=torch.long))
    torch.testing.assert_close(merge.sum(dim=1), torch.ones(keep))
    sizes = (merge > 0).sum(dim=1)
    side = (576 / keep) ** 0.5
    assert int(sizes.max()) <= (side + 1) ** 2 * 1.25
    assert int(sizes.min()) >= (side - 1) ** 2 / 1.25


def test_cells_without_patches_are_made_up_for() -> None:
    """Of a checkerboard half of the smallest cells are empty; all patches still count once."""
    view = random_view(8, 8)
    black = (view.places.sum(dim=1) % 2 == 0).nonzero().flatten()
    selection = PoolRule().select(view.part(black), 30)
    assert torch.equal((selection.merge > 0).sum(dim=0), torch.ones(32, dtype=torch.long))
    assert int((selection.merge > 0).sum(dim=1).max()) <= 2


@pytest.mark.parametrize(("keep", "dominant"), [(192, 162), (128, 108), (64, 54), (1, 1), (3, 3), (4, 3)])
def test_visionzip_splits_as_the_paper(keep: int, dominant: int) -> None:
    view = random_view(24, 24)
    selection = VisionZipRule().select(view, keep)
    alone = keep if selection.merge is None else int(((selection.merge > 0).sum(dim=1) == 1).sum())
    assert alone == dominant
    assert set(best(view.received, dominant).tolist()) <= set(selection.kept.tolist())


@pytest.mark.parametrize(("variant", "merged"), [("paper", 1.0), ("code", 2.0)])
def test_weights_of_visionzip_sum_to_what_the_variant_says(variant: str, merged: float) -> None:
    merge = VisionZipRule(variant=variant).select(random_view(24, 24), 64).merge
    assert torch.equal((merge > 0).sum(dim=0) > 0, torch.ones(576, dtype=torch.bool))  # nothing is lost
    totals = sorted(round(total, 4) for total in merge.sum(dim=1).tolist())
    assert totals == [1.0] * 54 + [merged] * 10


def test_a_draw_is_uniform_and_depends_on_seed_and_image_alone() -> None:
    view = random_view(3, 4)
    draws = [chosen(RandomRule(seed=seed), view, 3) for seed in range(2000)]
    counts = torch.tensor(draws).flatten().bincount(minlength=12)
    # 500 each are expected, with a standard deviation of 19.4
    assert int((counts - 500).abs().max()) < 5 * 19.4
    assert len({tuple(draw) for draw in draws}) > 200  # of 220 subsets
    assert chosen(RandomRule(), view, 3) != chosen(RandomRule(), replace(view, number=1), 3)
    assert set(chosen(RandomRule(), view, 3)) < set(chosen(RandomRule(), view, 7))


def test_options_change_what_stays() -> None:
    view = random_view(8, 8, like=2)
    kept = {
        name: tuple(chosen(rule, view, 20)) for name, rule in RULES.items() if rule.name not in ("pool", "visionzip")
    }
    assert len(set(kept.values())) == len(kept)


def test_cdpruner_without_a_question_goes_by_diversity_alone() -> None:
    view = replace(random_view(5, 5), question=torch.zeros(0, 40))
    assert chosen(CDPrunerRule(), view, 6) == chosen(CDPrunerRule(sign=1), view, 6)
    CDPrunerRule(cen=True).select(view, 6).check(25, 6, "cdpruner")


def test_duplicates_add_nothing_to_a_diverse_choice() -> None:
    """Every token twice, in half the width: one of each first, by both rules that look for diversity."""
    view = random_view(2, 6)
    twice = replace(view.part(torch.arange(12).repeat(2)), question=torch.zeros(0, 40))
    for rule in (DivPruneRule(), CDPrunerRule()):
        assert sorted(index % 12 for index in chosen(rule, twice, 12)) == list(range(12))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VisionZipRule(variant="other"), "variant is 'other'"),
        (lambda: VisionZipRule(contextual=1.5), "contextual is 1.5"),
        (lambda: HiredRule(alpha=-0.1), "alpha is -0.1"),
        (lambda: ScopeRule(alpha=-1), "alpha is -1"),
        (lambda: VisPrunerRule(step=0), "step is 0"),
        (lambda: CDPrunerRule(sign=0), "sign is 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], ImageRule], said: str) -> None:
    with pytest.raises(FlagError, match=said):
        make()


def test_a_third_party_adds_a_rule() -> None:
    """Everything that it takes; the last lines show that a name belongs to one rule."""

    @register
    @dataclass(frozen=True)
    class LoudestRule(ImageRule):
        """The tokens with the longest features."""

        name: ClassVar[str] = "loudest-of-a-test"
        reference: ClassVar[str] = "this test"
        place: ClassVar[str] = "features"

        power: float = 2.0

        def select(self, image: ImageView, keep: int) -> Selection:
            return Selection(best(image.projected.float().norm(p=self.power, dim=1), keep))

    view = random_view(3, 3)
    lengths = view.projected.norm(dim=1).tolist()
    assert chosen(LoudestRule(), view, 2) == sorted(sorted(range(9), key=lambda index: -lengths[index])[:2])
    with pytest.raises(ValueError, match="two reduction rules call themselves 'loudest-of-a-test'"):
        register(type("Other", (LoudestRule,), {}))
