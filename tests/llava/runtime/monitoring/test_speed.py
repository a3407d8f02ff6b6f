"""The rates of a line of the log, against counts and a clock that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava.runtime.monitoring.speed import GIB, LEFT, MEMORY, SAMPLES, TARGETS, SpeedMeter, peak_memory, shifted_targets

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def two_processes(rows: Tensor) -> Tensor:
    """Two processes of which the second one has trained on twice as much, in half of the memory."""
    return torch.cat([rows, rows * torch.tensor([2, 2, 1]) // torch.tensor([1, 1, 2])])


def test_a_line_counts_since_the_line_before_over_all_processes() -> None:
    clock = Clock()
    meter = SpeedMeter(CPU, clock)
    assert meter.line(two_processes, 0, 10) == {}
    meter.begin(4)  # a run that was resumed after its fourth update
    for _ in range(2):
        meter.add(3, torch.tensor(50))
    clock.now += 4
    first = meter.line(two_processes, 6, 10)
    assert first[SAMPLES] == pytest.approx(3 * 6 / 4)
    assert first[TARGETS] == pytest.approx(3 * 100 / 4)
    assert first[LEFT] == pytest.approx(4 / 2 * 4)
    assert first[MEMORY] == pytest.approx(peak_memory(CPU) / GIB, rel=0.05)
    meter.begin(6)  # every update does so
    meter.add(3, torch.tensor(10))
    clock.now += 1
    with meter.paused():
        clock.now += 7
    second = meter.line(two_processes, 7, 10)
    assert (second[SAMPLES], second[TARGETS]) == (pytest.approx(9.0), pytest.approx(30.0))
    assert second[LEFT] == pytest.approx(12 / 3 * 3), "evaluations come again, so they are part of the time left"


def test_the_first_position_is_no_target() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, 8, 9]])
    assert int(shifted_targets(labels)) == 3


def test_a_short_time_left_is_not_rounded_to_nothing() -> None:
    clock = Clock()
    meter = SpeedMeter(CPU, clock)
    meter.begin(0)
    clock.now += 0.02
    assert meter.line(two_processes, 1, 2)[LEFT] == pytest.approx(0.02)
    clock.now += 0.02
    assert meter.line(two_processes, 2, 2)[LEFT] == 0
