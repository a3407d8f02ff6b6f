"""Scorers and converters: lines and files of the original programs, to the digit and byte."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.errors import LlavaError
from tests.golden import golden_dir

METRICS = golden_dir("metrics")
SYSTEMS = sorted(path.parent.name for path in METRICS.glob("*/expected_run.json"))

MENDED = {
    ("pope", 1): "Precision: 0.0",
    ("scienceqa_eval", 1): "IMG-Accuracy: no such questions",
    ("seed_submission", 1): "Instance Location: 0.00%",
}
"""Commands that end with an error in the original and are carried out here (`docs/differences.md`)."""

LENIENT = {
    *(("mmbench_submission", 0), ("pope", 0), ("pope", 1), *(("scienceqa_eval", number) for number in range(3))),
    *(("textvqa", 0), ("textvqa", 1), ("vqav2_submission", 0)),
}
"""Commands whose answers do not fit their questions one to one: refused here without `--lenient`."""

NOT_WRITTEN = {"upload_answers_one_missing.jsonl"}
"""What the original leaves half-written when it fails."""


def commands(system: str) -> list[dict[str, Any]]:
    return json.loads((METRICS / system / "expected_run.json").read_text(encoding="utf-8"))["commands"]


CASES = [(system, number) for system in SYSTEMS for number in range(len(commands(system)))]


def run(argv: list[str]) -> None:
    name = argv[0].removesuffix(".py").replace("/", ".")
    importlib.import_module(name).main(argv[1:])


def words(system: str, number: int) -> list[str]:
    """A command, with `--lenient` where the original takes what does not fit."""
    return commands(system)[number]["argv"] + ["--lenient"] * ((system, number) in LENIENT)


def by_category(stdout: str) -> set[str]:
    """POPE's categories come in the order of a directory listing in the original."""
    return set(stdout.split("====================================\n"))


def cells(path: Path) -> dict[str, Any]:
    sheet = pytest.importorskip("openpyxl", reason="the extra `eval` is not installed").load_workbook(path).active
    return {"sheet": sheet.title, "rows": [list(row) for row in sheet.iter_rows(values_only=True)]}


def test_there_are_cases() -> None:
    assert len(SYSTEMS) == 10
    assert len(CASES) == 41


@pytest.mark.parametrize(("system", "number"), CASES)
def test_printed_lines(
    system: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if system == "mmbench_submission":
        pytest.importorskip("openpyxl", reason="the extra `eval` is not installed")
    shutil.copytree(METRICS / system / "input", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    case = commands(system)[number]
    if (system, number) in MENDED:
        run(words(system, number))
        assert MENDED[system, number] in capsys.readouterr().out
    elif case["returncode"]:
        before = set(Path().rglob("*"))
        with pytest.raises(LlavaError):
            run(case["argv"])
        assert set(Path().rglob("*")) == before
    else:
        run(words(system, number))
        out = capsys.readouterr().out
        same = by_category if system == "pope" else str
        assert same(out) == same(case["stdout"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_written_files(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(METRICS / system / "input", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    for number, case in enumerate(commands(system)):
        if not case["returncode"]:
            run(words(system, number))
    expected = METRICS / system / "expected"
    for path in sorted(path for path in expected.rglob("*") if path.is_file() and path.name not in NOT_WRITTEN):
        ours = Path(path.relative_to(expected))
        if path.name.endswith(".xlsx.cells.json"):
            there = json.loads(path.read_text(encoding="utf-8"))
            assert cells(ours.with_name(path.name.removesuffix(".cells.json"))) == there
        else:
            assert ours.read_bytes() == path.read_bytes(), ours


def test_the_two_folders_of_the_sparse_models_script(tmp_path: Path) -> None:
    """Dynamic-LLaVA's script names the questions' folder and that of the results apart."""
    system = METRICS / "vqav2_submission"
    shutil.copytree(system / "input" / "vqav2" / "answers", tmp_path / "results" / "answers")
    split = "llava_vqav2_mscoco_test-dev2015"
    folders = ["--test_dir", str(system / "input" / "vqav2"), "--result_dir", str(tmp_path / "results")]
    run(["scripts/convert_vqav2_for_submission.py", "--split", split, "--ckpt", "tiny", *folders, "--lenient"])
    written = Path("answers_upload") / split / "tiny.json"
    assert (tmp_path / "results" / written).read_bytes() == (system / "expected" / "vqav2" / written).read_bytes()


@pytest.mark.parametrize(("system", "number"), sorted(LENIENT))
def test_what_does_not_fit_is_refused(
    system: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `--lenient`: nothing is written; with it, the same is said as a warning."""
    if system == "mmbench_submission":
        pytest.importorskip("openpyxl", reason="the extra `eval` is not installed")
    shutil.copytree(METRICS / system / "input", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    before = set(Path().rglob("*"))
    with pytest.raises(LlavaError, match=r"answers do not fit \d+ questions .*--lenient scores what fits") as error:
        run(commands(system)[number]["argv"])
    assert set(Path().rglob("*")) == before
    capsys.readouterr()
    run(words(system, number))
    assert str(error.value).partition(". An unfinished")[0] in capsys.readouterr().err


POPE = METRICS / "pope" / "input"


def pope(*more: str) -> Any:
    argv = ["--annotation-dir", POPE / "coco", "--question-file", POPE / "llava_pope_test.jsonl"]
    argv += ["--result-file", POPE / "answers.jsonl", *more]
    return importlib.import_module("llava.eval.eval_pope").main([str(word) for word in argv])


def test_pope_warns_of_unequal_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(pope("--lenient")) == 3
    assert "21 answers of category 'random' for 22 labels" in capsys.readouterr().err


def test_pope_is_strict_or_lenient() -> None:
    with pytest.raises(LlavaError, match="--strict and --lenient exclude each other"):
        pope("--strict", "--lenient")
