"""Grouping by length and modality against the golden orders."""

from __future__ import annotations

import pytest
import torch

from llava.errors import FlagError
from llava.runtime.sampling import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from tests.golden import load_case

CASE, _ = load_case("llava", "length_grouping")


def pairs(name: str) -> list[tuple[dict, object]]:
    """Inputs of the golden cases of one kind, each with its result."""
    assert len(CASE[name]) == len(CASE["out"][name]) > 0
    return list(zip(CASE[name], CASE["out"][name], strict=True))


def generator_of(case: dict) -> torch.Generator | None:
    """Seed the global generator and make the case's own, as far as it wants them."""
    if case["global_seed"] is not None:
        torch.manual_seed(case["global_seed"])
    seed = case.get("generator_seed")
    return None if seed is None else torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("case", "expected"), pairs("chunks"))
def test_split_to_even_chunks(case: dict, expected: list) -> None:
    assert split_to_even_chunks(**case) == expected


@pytest.mark.parametrize(("case", "expected"), pairs("length"))
def test_length_grouping(case: dict, expected: list) -> None:
    generator = generator_of(case)
    assert get_length_grouped_indices(case["lengths"], case["batch_size"], case["world_size"], generator) == expected


@pytest.mark.parametrize(("case", "expected"), pairs("modality"))
def test_modality_grouping(case: dict, expected: list | dict) -> None:
    arguments = (case["lengths"], case["batch_size"], case["world_size"], generator_of(case))
    if isinstance(expected, dict):
        with pytest.raises(FlagError, match="row 2 has no words"):
            get_modality_length_grouped_indices(*arguments)
        return
    assert get_modality_length_grouped_indices(*arguments) == expected


@pytest.mark.parametrize(("case", "expected"), pairs("sampler"))
def test_sampler_over_two_epochs(case: dict, expected: dict) -> None:
    generator_of(case)
    sampler = LengthGroupedSampler(
        case["batch_size"], case["world_size"], case["lengths"], group_by_modality=case["group_by_modality"]
    )
    assert len(sampler) == expected["len"]
    assert list(sampler) == expected["first_epoch"]
    assert list(sampler) == expected["second_epoch"]


def test_modalities_are_kept_apart_except_in_the_last_megabatches() -> None:
    lengths = [5, -5] * 20
    torch.manual_seed(0)
    order = get_modality_length_grouped_indices(lengths, 2, 2)
    assert sorted(order) == list(range(40))
    for start in range(0, 32, 4):
        assert len({lengths[index] > 0 for index in order[start : start + 4]}) == 1
    torch.manual_seed(0)
    ungrouped = get_length_grouped_indices([abs(length) for length in lengths], 2, 2)
    assert any(len({lengths[index] > 0 for index in ungrouped[start : start + 4]}) == 2 for start in range(0, 32, 4))
