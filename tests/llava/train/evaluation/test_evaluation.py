"""Evaluation in the middle of a run: what it measures, and that the training does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model.formats import read_tensors
from llava.train.train import build_run, main, parse_args
from tests.llava.train.evaluation.common import ROWS, evaluated_line, evaluations
from tests.llava.train.test_training import HYDRA, command_line, losses

DYNAMIC = {"dynamic": True, "sparse_layer": 1, "freeze_backbone": True, "predictor_lr": 1e-2}
MMA = {"mma": True, "adapter_type": "block", "visual_adapter_type": "router_block", "visual_input": "llava"}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.5},
    "hydralora": HYDRA | {"lora_dropout": 0.5, "gradient_checkpointing": True},
    "dynamic": DYNAMIC,
    "mma": MMA | {"adapter_dropout": 0.5},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    assert files
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in read_tensors(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_evaluations_makes_the_same_updates(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    main(command_line(tmp_path / "plain", max_steps=4, **options))
    main(evaluated_line(tmp_path / "evaluated", tmp_path, **options))
    assert losses(tmp_path / "evaluated") == losses(tmp_path / "plain")
    plain, evaluated = weights(tmp_path / "plain"), weights(tmp_path / "evaluated")
    assert plain.keys() == evaluated.keys()
    assert all(torch.equal(evaluated[name], value) for name, value in plain.items())
    found = evaluations(tmp_path / "evaluated")
    assert [entry["step"] for entry in found] == [2, 4]
    assert found[0]["eval_loss"] != found[1]["eval_loss"]
    assert {"eval_image_loss", "eval_text_loss", "eval_task_seen_loss", "eval_asked_accuracy"} <= found[0].keys()


def test_losses_are_means_over_target_tokens(tmp_path: Path) -> None:
    """Against the loss of the model on one row at a time; the groups are those of the rows."""
    line = evaluated_line(tmp_path / "out", tmp_path)
    run = build_run(parse_args(line))
    metrics = run.trainer.evaluate()
    sums: dict[str, list[float]] = {}
    run.model.eval()
    for number, row in enumerate(ROWS):
        batch = run.trainer.data_collator([run.trainer.eval_dataset[number]])
        count = int(run.trainer.count_targets(batch))
        with torch.no_grad():
            loss = run.model(**batch).losses["lm"].item()
        modality = "image" if "image" in row or "images" in row else "text"
        for name in ("loss", f"{modality}_loss", f"task_{'seen' if 'image' in row else 'told'}_loss"):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += loss * count
            total[1] += count
    expected = {f"eval_{name}": total / count for name, (total, count) in sums.items()}
    assert len(expected) >= 4
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (metrics["eval_rows"], metrics["eval_rows_left_out"]) == (len(ROWS), 0)


def test_a_row_without_target_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = evaluated_line(tmp_path / "out", tmp_path, on_bad_sample="skip", eval_strategy="epoch", max_steps=1)
    path = tmp_path / "held_out.json"
    rows = json.loads(path.read_text())
    rows[1]["conversations"][0]["value"] = "A question that is much too long. " * 200
    path.write_text(json.dumps(rows))
    run = build_run(parse_args(line))
    metrics = run.trainer.evaluate()
    assert (metrics["eval_rows"], metrics["eval_rows_left_out"]) == (len(ROWS) - 1, 1)
    assert "evaluation  1 of 10 rows are left out; the first is row 1: " in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("skipped*")), "that list is of rows of the training"
