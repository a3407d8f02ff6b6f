"""Every line of progress says how fast the run is: of one process, of two, and of a run that was resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.runtime.monitoring.speed import LEFT, MEMORY, SAMPLES, TARGETS, SpeedMeter
from llava.train.train import build_run, main, parse_args
from tests.llava.train.launching import launch_runs
from tests.llava.train.test_training import command_line


def lines(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def check_lines(found: list[dict[str, Any]]) -> None:
    assert found
    for line in found:
        assert line[SAMPLES] > 0
        assert line[TARGETS] > 5 * line[SAMPLES], "an answer has more than five tokens"
        assert 0.05 < line[MEMORY] < 100
    assert found[-1][LEFT] == 0
    assert all(line[LEFT] > 0 for line in found[:-1])


def test_one_process_and_a_resumed_run(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}
    main(command_line(tmp_path / "whole", **options))
    check_lines(lines(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    main(command_line(tmp_path / "cut", **options))
    check_lines(lines(tmp_path / "cut"))
    last = json.loads((tmp_path / "cut" / "trainer_state.json").read_text())["log_history"][-1]
    # Two rows that end the first epoch and four of the next one, not the fourteen of the whole run.
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(6, rel=0.05)
    assert last["train_steps_per_second"] * last["train_runtime"] == pytest.approx(2, rel=0.05)


def test_what_is_counted_is_what_is_trained_on(tmp_path: Path) -> None:
    """Against the counts that the loss is divided by."""
    run = build_run(parse_args(command_line(tmp_path, max_steps=3, gradient_accumulation_steps=2)))
    counted: list[tuple[int, int]] = []

    class Meter(SpeedMeter):
        def line(self, *args: Any) -> dict[str, float]:
            counted.append((self._samples, int(self._targets)))
            return super().line(*args)

    divided_by: list[int] = []
    original = run.trainer._get_num_items_in_batch

    def number_of_items(*args: Any) -> Any:
        found = original(*args)
        divided_by.append(int(found))
        return found

    run.trainer.speed = Meter(run.trainer.args.device)
    run.trainer._get_num_items_in_batch = number_of_items  # type: ignore[method-assign]
    run.trainer.train()
    assert [samples for samples, _ in counted] == [4, 4, 2], "the last micro batches of ten rows are one"
    assert [targets for _, targets in counted] == divided_by


@pytest.mark.slow
def test_two_processes_are_added_up(tmp_path: Path) -> None:
    runs = [{"arguments": command_line(tmp_path / "two", per_device_train_batch_size=1, ddp_backend="gloo")}]
    launch_runs(2, runs, tmp_path)
    found = lines(tmp_path / "two")
    check_lines(found)
    last = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"][-1]
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(6, rel=0.05)
