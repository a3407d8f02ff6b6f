"""The best checkpoint and early stopping: what is kept, loaded at the end, and the same after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import CheckpointError, FlagError
from llava.runtime.monitoring.stopping import EarlyStopping
from llava.train.train import main, parse_args
from tests.llava.train.evaluation.common import evaluated_line, evaluations
from tests.llava.train.evaluation.test_evaluation import DYNAMIC, weights
from tests.llava.train.test_training import HYDRA, losses

# The loss falls, and is called the better the larger it is: the first evaluations are the best.
WORSE = {"metric_for_best_model": "loss", "greater_is_better": True, "eval_steps": 1, "save_steps": 1, "max_steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4},
    "hydralora": HYDRA,
    "dynamic": DYNAMIC,
    "projector": {"tune_mm_mlp_adapter": True},
}


def line(output: Path, folder: Path, **options: Any) -> list[str]:
    """A run that is evaluated on rows alone."""
    words = evaluated_line(output, folder, **(WORSE | options))
    place = words.index("--eval_questions")
    return words[:place] + words[place + 2 :]


def best_step(folder: Path) -> int:
    measured = {entry["step"]: entry["eval_loss"] for entry in evaluations(folder)}
    return max(measured, key=lambda step: measured[step])


@pytest.mark.parametrize("case", CASES)
def test_the_best_checkpoint_is_the_result(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = line(output, tmp_path, load_best_model_at_end=True, save_total_limit=1, **CASES[case])
    main(words)
    best = best_step(output)
    assert best < 4, "the test needs a run that gets worse"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{best}", "checkpoint-4"]
    assert f"best        {output}/checkpoint-{best}: eval_loss " in capsys.readouterr().out
    result, stored = weights(output), weights(output / f"checkpoint-{best}")
    assert result.keys() == stored.keys()
    assert all(torch.equal(result[name], value) for name, value in stored.items())
    last = weights(output / "checkpoint-4")
    assert any(not torch.equal(result[name], value) for name, value in last.items())
    main(words)  # nothing is left to train, and the result is the same
    assert "Nothing was left to train" in capsys.readouterr().out
    again = weights(output)
    assert all(torch.equal(again[name], value) for name, value in result.items())


def test_the_best_is_saved_between_two_checkpoints(tmp_path: Path) -> None:
    main(line(tmp_path / "out", tmp_path, load_best_model_at_end=True, save_steps=4))
    best = best_step(tmp_path / "out")
    assert best < 4
    assert (tmp_path / "out" / f"checkpoint-{best}").is_dir()


def test_only_the_best_are_saved(tmp_path: Path) -> None:
    output = tmp_path / "out"
    main(line(output, tmp_path, save_strategy="best", metric_for_best_model="text_loss", load_best_model_at_end=True))
    measured = {entry["step"]: entry["eval_text_loss"] for entry in evaluations(output)}
    better = [step for step, loss in measured.items() if all(loss > measured[other] for other in range(1, step))]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in better]
    state = json.loads((output / f"checkpoint-{better[-1]}" / "trainer_state.json").read_text())
    assert state["best_metric"] == measured[better[-1]]
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{better[-1]}")


def test_an_early_stop_is_the_same_after_an_interruption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"early_stopping_patience": 2, "load_best_model_at_end": True, "max_steps": 9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(line(whole, tmp_path, **options))
    stopped = evaluations(whole)[-1]["step"]
    assert stopped == best_step(whole) + 2 < 9
    # Interrupted one update before the end: the count of evaluations that were not better goes on.
    for step in (best_step(whole), stopped - 1):
        shutil.copytree(whole / f"checkpoint-{step}", cut / f"checkpoint-{step}", dirs_exist_ok=True)
    main(line(cut, tmp_path, **options))
    assert evaluations(cut)[-1]["step"] == stopped
    assert losses(cut) == losses(whole)
    expected, found = weights(whole), weights(cut)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    capsys.readouterr()
    main(line(cut, tmp_path, **options))  # a run that has stopped stays stopped
    assert "Nothing was left to train" in capsys.readouterr().out
    assert evaluations(cut)[-1]["step"] == stopped


def test_a_run_resumed_after_an_evaluation_is_exact(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(evaluated_line(whole, tmp_path, **HYDRA))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    main(evaluated_line(cut, tmp_path, **HYDRA))
    assert losses(cut) == losses(whole)
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    found = [evaluations(whole), evaluations(cut)]
    kept = [[{k: v for k, v in entry.items() if k not in timed} for entry in each] for each in found]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2
    expected, resumed = weights(whole), weights(cut)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    for each in (whole, cut):
        answers = (each / "evaluation" / "asked" / "update-4.jsonl").read_text()
        assert len(answers.splitlines()) == 5


def test_a_best_checkpoint_that_is_gone_is_said(tmp_path: Path) -> None:
    words = line(tmp_path / "out", tmp_path, load_best_model_at_end=True)
    main(words)
    best = best_step(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{best}")
    with pytest.raises(CheckpointError, match=f"checkpoint-{best}: is not there.*--load_best_model_at_end False"):
        main(words)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "--early_stopping_patience: needs evaluations"),
        ({"eval_strategy": "no", "save_strategy": "best"}, "--save_strategy best: needs evaluations"),
        ({"eval_strategy": "no"}, "have no effect without --eval_strategy"),
        ({"early_stopping_patience": 0}, "--early_stopping_patience 0"),
        ({"save_strategy": "best", "metric_for_best_model": "accuracy"}, "asked_<score>"),
        ({"eval_data_path": "missing.json"}, "--eval_data_path missing.json: no such file"),
        ({"eval_image_folder": "missing"}, "--eval_image_folder missing: no such folder"),
    ],
)
def test_refused_before_anything_is_loaded(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=complaint):
        parse_args(evaluated_line(tmp_path / "out", tmp_path, **options))


def test_names_of_questions_are_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.train.train.build_model", lambda *_: pytest.fail("a model is loaded"))
    said = "--eval_questions vqa: is neither a file nor a benchmark; the benchmarks are vqav2"
    with pytest.raises(FlagError, match=said):
        main(evaluated_line(tmp_path / "out", tmp_path, eval_questions="vqa"))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_metric_that_no_evaluation_has_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "best", "metric_for_best_model": "asked_f1", "eval_steps": 1, "max_steps": 1}
    with pytest.raises(FlagError, match="asked_f1: this run measures asked_accuracy"):
        main(evaluated_line(tmp_path / "out", tmp_path, **options))


def test_an_evaluation_at_the_start_is_not_repeated_by_a_resumed_run(tmp_path: Path) -> None:
    """Early stopping would count it once more."""
    output = tmp_path / "out"
    main(evaluated_line(output, tmp_path, eval_on_start=True, max_steps=3))
    assert [entry["step"] for entry in evaluations(output)] == [0, 2, 3]
    shutil.rmtree(output / "checkpoint-3")
    main(evaluated_line(output, tmp_path, eval_on_start=True, max_steps=3))
    assert [entry["step"] for entry in evaluations(output)] == [0, 2, 3]


@pytest.mark.parametrize("option", [{"early_stopping_patience": 3}, {"save_strategy": "best"}])
def test_without_a_metric_the_loss_decides(option: dict[str, Any], tmp_path: Path) -> None:
    args = parse_args(evaluated_line(tmp_path / "out", tmp_path, **option))
    assert (args.training.metric_for_best_model, args.training.greater_is_better) == ("loss", False)
    assert EarlyStopping(3).early_stopping_patience == 3
