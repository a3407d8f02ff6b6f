"""What wandb (offline) and TensorBoard receive from a run: the loss, its parts and the extension's metrics."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from llava.errors import FlagError
from llava.train.train import main, parse_args
from tests.llava.train.test_training import HYDRA, command_line, losses

NAMES = {"loss", "loss/lm", "loss/hydralora/balance", "hydralora/share_0", "hydralora/entropy", "learning_rate"}


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--logging_dir`, an option of transformers 4, still says where the files go."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra `train` is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "replaced below")
    options = HYDRA | {"report_to": "tensorboard", "logging_dir": tmp_path / "events"}
    main(command_line(tmp_path / "out", **options))
    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert {f"train/{name}" for name in NAMES} <= set(events.Tags()["scalars"])
    recorded = [event.value for event in events.Scalars("train/loss")]
    assert recorded == pytest.approx(losses(tmp_path / "out"), rel=1e-6)
    assert len(recorded) == 3


def test_wandb_offline(tmp_path: Path, offline_wandb: ModuleType) -> None:
    main(command_line(tmp_path / "out", **HYDRA, report_to="wandb", run_name="tiny"))
    run = offline_wandb.run
    summary = dict(run.summary)
    config = dict(run.config)
    offline_wandb.finish()
    assert {f"train/{name}" for name in NAMES} <= set(summary)
    assert summary["train/loss"] == pytest.approx(losses(tmp_path / "out")[-1], rel=1e-6)
    assert config["learning_rate"] == 1e-2
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    with pytest.raises(FlagError, match="--report_to wandb: needs the package of wandb"):
        parse_args(command_line(tmp_path, report_to="wandb"))


def test_a_line_for_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Base, tower, extensions, data, training, saving, in this order; the second run says where it resumes."""
    options = HYDRA | {"max_steps": 1, "save_steps": 1}
    main(command_line(tmp_path / "out", **options))
    first = capsys.readouterr().out
    starts = [
        "base  ",
        "tower  ",
        "answer end  '</s>'",
        "extensions  hydralora",
        "data        10 rows",
        "training    updates: 1",
        "saving  ",
    ]
    lines = [line for line in first.splitlines() if line.startswith(tuple(starts))]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    main(command_line(tmp_path / "out", **options))
    assert "resumed from checkpoint-1" in capsys.readouterr().out
    assert "resumed" not in first
