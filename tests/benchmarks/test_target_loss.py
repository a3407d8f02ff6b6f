"""The benchmark of the loss: what it counts as bytes, and that both ways compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.target_loss import Case, PeakStorage, measure, table


def test_a_storage_counts_once_and_until_it_is_gone() -> None:
    before = torch.zeros(1000)
    with PeakStorage() as storage:
        made = before + 1
        made.view(10, 100).add_(1)
        assert storage.peak == 4000
        del made
        kept = before * 2
        assert storage.peak == 4000
        also = before * 3
    assert storage.peak == 8000
    assert kept.shape == also.shape


def test_both_ways_give_one_loss() -> None:
    found = measure(Case(2, 200, 8, 500, 0.25), rounds=1)
    assert found["loss"]["targets"] == pytest.approx(found["loss"]["all logits"], rel=1e-5)
    logits = 2 * 200 * 500 * 4
    assert found["peak_bytes"]["targets"] < logits <= found["peak_bytes"]["all logits"]
    assert table([found]).count("\n") == 2
