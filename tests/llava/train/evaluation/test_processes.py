"""Evaluation by two processes, with plain data parallelism and under ZeRO-3, equals that of one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.train.train import main
from tests.llava.train.evaluation.common import evaluated_line, evaluations
from tests.llava.train.evaluation.test_best import best_step
from tests.llava.train.evaluation.test_evaluation import weights
from tests.llava.train.launching import ROOT, launch_runs
from tests.llava.train.test_training import losses

pytestmark = pytest.mark.slow
SHARED = {"train_sampling_strategy": "sequential", "max_steps": 4, "eval_steps": 2, "per_device_eval_batch_size": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True, "save_steps": 2}
BEST |= {"eval_steps": 1}


def answers(folder: Path, update: int) -> list[str]:
    lines = (folder / "evaluation" / "asked" / f"update-{update}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes, in one launch."""
    folder = tmp_path_factory.mktemp("processes")
    kinds: dict[str, dict[str, Any]] = {"plain": {"ddp_backend": "gloo"}}
    if importlib.util.find_spec("deepspeed") is not None:
        kinds["zero3"] = {"deepspeed": ROOT / "scripts" / "zero3.json"}
    runs = []
    for name, options in kinds.items():
        shared = SHARED | options | {"per_device_train_batch_size": 1}
        runs.append({"arguments": evaluated_line(folder / name, folder, **shared)})
        unmeasured = [word for word in evaluated_line(folder / f"{name} unmeasured", folder, **shared)]
        runs.append({"arguments": without_evaluation(unmeasured)})
        runs.append({"arguments": evaluated_line(folder / f"{name} best", folder, **(shared | BEST))})
    launch_runs(2, runs, folder)
    main(evaluated_line(folder / "one", folder, **SHARED, per_device_train_batch_size=2))
    return folder


def without_evaluation(words: list[str]) -> list[str]:
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for name, value in pairs if "eval" not in name for word in (name, value)]


@pytest.mark.parametrize("kind", ["plain", "zero3"])
def test_two_processes_measure_what_one_measures(folder: Path, kind: str) -> None:
    if not (folder / kind).is_dir():
        pytest.skip("the extra 'train' is not installed")
    ours, theirs = evaluations(folder / "one"), evaluations(folder / kind)
    assert [entry["step"] for entry in theirs] == [2, 4]
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - timed:
            # Rounding of the sums of gradients, which Adam magnifies in its first steps.
            assert two[name] == pytest.approx(one[name], abs=2e-2), name
        assert one["eval_rows"] == two["eval_rows"] == 10
    assert len(answers(folder / kind, 2)) == 5
    assert answers(folder / kind, 2) == answers(folder / "one", 2)


@pytest.mark.parametrize("kind", ["plain", "zero3"])
def test_the_training_does_not_notice(folder: Path, kind: str) -> None:
    if not (folder / kind).is_dir():
        pytest.skip("the extra 'train' is not installed")
    assert losses(folder / kind) == losses(folder / f"{kind} unmeasured")
    expected, found = weights(folder / f"{kind} unmeasured"), weights(folder / kind)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["plain", "zero3"])
def test_the_best_checkpoint_is_the_result(folder: Path, kind: str) -> None:
    if not (folder / kind).is_dir():
        pytest.skip("the extra 'train' is not installed")
    output = folder / f"{kind} best"
    best = best_step(output)
    assert best < 4
    result, stored, last = (weights(each) for each in (output, output / f"checkpoint-{best}", output / "checkpoint-4"))
    assert all(torch.equal(result[name], value) for name, value in stored.items())
    assert any(not torch.equal(result[name], value) for name, value in last.items())
