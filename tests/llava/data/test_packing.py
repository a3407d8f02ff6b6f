"""Which samples share a row: each is in one place, nothing is cut, and no batch grows."""

from __future__ import annotations

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.packing import arrange
from llava.data.splice_plan import plan_splice
from llava.segments import Span, SpliceOptions, SplicePlan

I = IMAGE_TOKEN_INDEX  # noqa: E741


def size(lengths: list[int], places: list[tuple[int, int]]) -> tuple[int, int]:
    """Rows, and the length of the longest one."""
    ends = [start + length for length, (_, start) in zip(lengths, places, strict=True)]
    return max(row for row, _ in places) + 1, max(ends)


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_has_its_place(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 17, (), generator=generator))
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    capacity = int(torch.randint(30, 200, (), generator=generator))
    places = arrange(lengths, capacity)
    taken = [(row, start + at) for length, (row, start) in zip(lengths, places, strict=True) for at in range(length)]
    rows, longest = size(lengths, places)
    assert len(set(taken)) == len(taken) == sum(lengths)
    assert longest <= max(capacity, *lengths)
    assert rows * longest <= count * max(lengths)
    assert {row for row, _ in places} == set(range(rows))
    assert places == arrange(lengths, capacity)


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([30, 10, 20], 64, (1, 60)),
        ([30, 10, 20], None, (1, 60)),
        ([30, 30, 30, 30], 64, (2, 60)),
        ([70, 10, 20], 64, (2, 70)),  # one that is longer than a row has its own
        ([40, 40, 40], 100, (3, 40)),  # two rows would have 160 positions, a row each has 120
        ([5], 64, (1, 5)),
    ],
)
def test_the_fewest_positions_are_taken(lengths: list[int], capacity: int | None, expected: tuple[int, int]) -> None:
    assert size(lengths, arrange(lengths, capacity)) == expected


def plans(limit: int = 12) -> tuple[SplicePlan, SplicePlan]:
    """Three samples with no image, one and two, in rows of their own and packed."""
    rows = [[2, 9, 4], [2, 5, I, 8, 6], [I, 3, I, 6]]
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), True
    labels = torch.where((ids > 0) & (ids % 2 == 0), ids, IGNORE_INDEX)
    lengths = [2, 2, 3, 1]
    apart = plan_splice(ids, labels, mask, lengths, SpliceOptions(limit, "right"))
    return apart, plan_splice(ids, labels, mask, lengths, SpliceOptions(limit, "left"), packing=True)


def test_positions_labels_and_images_of_packed_rows() -> None:
    """The samples have 3, 6 and 6 positions, and a row has 12; packed rows are padded on the right in any case."""
    apart, plan = plans()
    assert plan.packed is not None
    assert plan.packed.rows == (0, 0, 1)
    assert plan.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 0, 0]]
    assert plan.packed.samples.tolist() == [[0] * 3 + [1] * 6, [2] * 6 + [3] * 3]
    assert plan.packed.bounds.tolist() == [0, 3, 9, 15, 18]
    assert plan.packed.longest == 6
    assert plan.packed.positions == apart.labels[:, 1:].numel() == 15
    assert plan.attention_mask.tolist() == [[True] * 9, [True] * 6 + [False] * 3]
    assert plan.padding == "right"
    assert plan.targets == apart.targets
    assert sorted(plan.target_labels.tolist()) == sorted(apart.target_labels.tolist())
    assert [segments.images for segments in plan.segments] == [(), (Span(5, 7),), (Span(0, 3), Span(4, 5))]
    assert plan.slots.tolist() == [5, 6, 9, 10, 11, 13]
    assert plan.feature_rows is not None
    assert plan.feature_rows.tolist() == [2, 3, 4, 5, 6, 7]
    for values in (torch.arange(18.0).view(2, 9), torch.arange(36.0).view(2, 9, 2)):
        flat = values.flatten(0, 1)
        expected = torch.stack([flat[:3].sum(0), flat[3:9].sum(0), flat[9:15].sum(0)])
        assert torch.equal(plan.packed.sums(values), expected)
        assert torch.equal(plan.packed.spread(expected).flatten(0, 1)[[2, 3, 14]], expected)
        assert not plan.packed.spread(expected)[1, 6:].any()


def test_nobody_predicts_how_the_next_sample_begins() -> None:
    tokens, options = torch.tensor([[3, 5], [4, 6]]), SpliceOptions(8, "right")
    alone, both = (plan_splice(tokens, tokens, None, None, options, packing) for packing in (False, True))
    assert alone.targets == both.targets == 2
    assert alone.labels.tolist() == tokens.tolist()
    assert both.labels.tolist() == [[3, 5, IGNORE_INDEX, 6]]
