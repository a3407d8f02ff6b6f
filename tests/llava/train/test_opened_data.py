"""What cannot be read, or has too few rows, is said before a model is made, and by one process before the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.data.formats import table
from llava.errors import FlagError
from llava.train import build, opened_data
from llava.train import train as program
from llava.train.train import main, parse_args
from tests.llava.train.test_training import command_line


def _fail(*args: Any, **options: Any) -> None:
    raise AssertionError("not yet")


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a mistyped path": ({"data_path": "data/train"}, "data/train: there is no such file or folder"),
    "one to evaluate on": (
        {"eval_data_path": "data/test", "eval_strategy": "steps", "eval_steps": 1},
        "data/test: there is no such file or folder",
    ),
    "one of a stream": ({"data_path": "data/train", "streaming": True}, "data/train: there is no such file or folder"),
    "too few rows": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 1000},
        "--per_device_train_batch_size 1000",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_data_is_opened_before_the_model_is_made(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(program, "build_model", _fail)
    options, message = CASES[case]
    words = command_line(tmp_path / "out", max_steps=1, **options)
    with monkeypatch.context() as patched:  # options are read without the data
        patched.setattr(build, "open_rows", _fail)
        patched.setattr(opened_data, "rows_of_run", _fail)
        parse_args(words)
    with pytest.raises(FlagError, match=message):
        main(words)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PACKAGE", "no_such_package_here")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in (tmp_path / "a.parquet", "owner/set"):
        with pytest.raises(FlagError, match=rf"{source}: needs the package"):
            parse_args(command_line(tmp_path / "out", data_path=source))
