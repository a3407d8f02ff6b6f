"""The benchmark of evaluation: both ways give the same answers, and the record is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import eval as program
from llava.errors import FlagError

TINY = ["--models", "tiny", "--device", "cpu", "--questions", "5", "--tokens", "3", "--repeats", "2"]


def test_record_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "eval.json"
    record = program.main([*TINY, "--batch-sizes", "1", "4", "--output", str(path)])
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    (result,) = record["results"]
    assert [way["way"] for way in result["ways"]] == ["one by one", "batch 1", "batch 4"]
    assert all(way["same_answers"] == 5 and way["images_per_second"] > 0 for way in result["ways"])
    assert result["ways"][0]["speedups"] == [1.0, 1.0]
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("| tiny | 3 |") == 3
    assert "Written:" in capsys.readouterr().out


def test_other_answers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A speed-up by other answers is none."""
    real = program.in_batches
    monkeypatch.setattr(program, "in_batches", lambda *given: {key: text + "!" for key, text in real(*given).items()})
    with pytest.raises(FlagError, match="5 of 5 answers differ"):
        program.main([*TINY, "--batch-sizes", "4"])


@pytest.mark.parametrize(
    ("words", "message"), [(["--models", "huge"], "there are"), (["--output", "eval.txt"], "ends in .json")]
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        program.main([*TINY, *words])
