"""The table of benchmarks: every entry runs from questions to score on a tiny model, in the published layout."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import FlagError
from llava.eval import __main__ as engine
from llava.eval import eval_chartqa
from llava.eval.answering import batches, processes
from llava.eval.answering import question_run as program
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.processes import Processes
from llava.eval.benchmarks import BENCHMARKS, find
from llava.eval.scoring import captions
from llava.train.evaluation.options import EvaluationArguments
from llava.train.evaluation.questions import question_sets
from llava.train.evaluation.scores import shown_answers
from tests.llava.train.launching import ROOT, torchrun

LABELS = {"gqa": "x", "textvqa": "x", "scienceqa": "A", "mmbench": "A", "mmbench_cn": "A", "seed": "A"}
LABELS |= {"qbench": "B", "chartqa": "10.4", "mme": "Yes", "pope": "yes", "coco_caption": "a cat on a lake"}
"""What a model says that answers every question alike, and what it then scores."""
SCORES = {"gqa": 100, "textvqa": 100, "scienceqa": 100, "mmbench": 100, "mmbench_cn": 100, "seed": 100, "qbench": 100}
SCORES |= {"chartqa": 100, "mme": 50, "pope": 65}
WITHOUT_SCORES = {"vqav2", "vizwiz", "mmvet", "llavabench"}


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    monkeypatch.setattr(program, "load_model", lambda *_, **__: loaded)


def run(name: str, checkpoint: Path, folder: Path, *more: str) -> Any:
    common = ["--model-path", str(checkpoint), "--data-dir", str(folder), "--device", "cpu"]
    return engine.main([name, *common, *more])


SHORT = ("--max_new_tokens", "4")


def needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without the extra; COCO's own tokenizer, a Java program, has its test in `test_captions.py`."""
    if name.startswith("mmbench"):
        pytest.importorskip("openpyxl", reason="the extra `eval` is not installed")
    if name == "coco_caption":
        pytest.importorskip("pycocoevalcap", reason="the extra `eval` is not installed")
        tokenize = captions.tokenize
        monkeypatch.setattr(captions, "tokenize", lambda texts, _: tokenize(texts, "plain"))


def runnable() -> list[str]:
    return [name for name in BENCHMARKS if name != "qbench_zh"]  # asks the same file


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("name", runnable())
def test_from_questions_to_result(
    name: str, checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(name, monkeypatch)
    result = run(name, checkpoint, folder, "--max_new_tokens", "4")
    answers = Path(result["answers_file"])
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == result["questions"] >= 3
    assert all(isinstance(row.get("text", row.get("response")), str) for row in rows)
    assert json.loads(answers.with_name(f"{answers.stem}.result.json").read_text(encoding="utf-8")) == result
    assert bool(result["metrics"]) == (name not in WITHOUT_SCORES)
    assert all(Path(path).exists() for path in result["files"])
    assert result["settings"]["torch_dtype"] == "torch.float32"
    assert result["first_prompt"].startswith("A chat between")
    assert result["speed"]["batch_size"] == batches.FIRST_BATCH_SIZE["cpu"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{find(name).title} ({result['split']}, {result['questions']} questions) | tiny-llava-v1.5")


@pytest.mark.parametrize("name", LABELS)
def test_known_answers_score_as_they_should(
    name: str, checkpoint: Path, folder: Path, say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(name, monkeypatch)
    say(LABELS[name])
    result = run(name, checkpoint, folder)
    metrics = result["metrics"]
    if name != "mme":  # its folder of results holds every answer
        answers = Path(result["answers_file"])
        log = answers.with_name(f"{answers.stem}.samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(log) == result["questions"]
        assert all({"text", "score"} <= json.loads(line).keys() or name == "scienceqa" for line in log)
    if name == "coco_caption":
        assert metrics["CIDEr"] > 100
        return
    # POPE: of "yes, no, yes" and "no, no, yes", always yes has F1 of 0.8 and 0.5. MME: half of the questions, no image.
    assert next(iter(metrics.values())) == pytest.approx(SCORES[name])
    say("maybe")
    assert next(iter(run(name, checkpoint, folder, "--restart")["metrics"].values())) == pytest.approx(
        SCORES[name] if name == "pope" else 0
    )


@pytest.mark.parametrize("name", runnable())
def test_scores_in_the_middle_of_a_training(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--eval_questions NAME`: the scores of `python -m llava.eval`, and no file for a server."""
    needs(name, monkeypatch)
    (asked,) = question_sets(EvaluationArguments(eval_questions=[name], eval_data_dir=str(folder)), None)
    rows = [asked.to_row(task, LABELS.get(name, "A"), "training") for task in asked.tasks]
    path = tmp_path / "update-3.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {file for file in folder.rglob("answers_upload/**/*")}
    outcome = asked.score(path, rows)
    assert bool(outcome.metrics) == (name not in WITHOUT_SCORES)
    if name in SCORES:
        assert next(iter(outcome.metrics.values())) == pytest.approx(SCORES[name])
    assert {file for file in folder.rglob("answers_upload/**/*")} == before
    assert len(shown_answers(asked, rows, outcome, 2)) == 2


def test_chinese_quality_questions(checkpoint: Path, folder: Path, say: Callable[[str], None]) -> None:
    say("A")
    result = run("qbench_zh", checkpoint, folder)
    assert "在下列选项中选择一个:\nA. very\nB. not\n" in result["first_prompt"]
    assert result["metrics"]["letter accuracy"] == 0


def test_a_limit_is_no_whole_benchmark(
    checkpoint: Path, folder: Path, say: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vqav2", "gqa", "scienceqa", "seed", "textvqa", "pope", "mme"):
        say(LABELS.get(name, "x"))
        result = run(name, checkpoint, folder, "--limit", "2")
        assert result["questions"] == 2
        assert "first-2" in result["answers_file"]
        assert "NOT THE WHOLE BENCHMARK" in capsys.readouterr().out.splitlines()[-1]
        if name in ("gqa", "scienceqa", "seed", "textvqa"):
            assert next(iter(result["metrics"].values())) == 100
    assert not list(folder.rglob("answers_upload"))
    with pytest.raises(FlagError, match="--limit 0: must be at least 1"):
        run("gqa", checkpoint, folder, "--limit", "0")


def test_chunks_are_merged_by_the_last_run(checkpoint: Path, folder: Path, say: Callable[[str], None]) -> None:
    say("10")
    parts = [folder / f"{index}.jsonl" for index in range(4)]
    for index, part in enumerate(parts):
        chunk = ["--num-chunks", "4", "--chunk-idx", str(index), "--allow-empty-chunk", "--answers-file", str(part)]
        assert run("chartqa", checkpoint, folder, *chunk) is None
    assert [len(part.read_text().splitlines()) for part in parts] == [2, 2, 2, 0]
    (folder / "merge.jsonl").write_text("".join(part.read_text() for part in parts))
    say("never asked")
    result = run("chartqa", checkpoint, folder, "--answers-file", str(folder / "merge.jsonl"))
    assert result["metrics"]["relaxed accuracy all"] == 100
    assert result["speed"] is None


@pytest.mark.usefixtures("_tiny")
def test_batches_shrink_when_memory_runs_out(
    checkpoint: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: LoadedModel,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A device with room for two questions: the answers are those of one at a time, none is lost or asked twice."""
    one_by_one = run("mme", checkpoint, folder, *SHORT, "--batch-size", "1", "--experiment", "single")
    generate, sizes = loaded.model.generate, []

    def small(inputs: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if len(inputs) > room:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(inputs))
        return generate(inputs, **arguments)

    monkeypatch.setattr(loaded.model, "generate", small)
    room = 2
    result = run("mme", checkpoint, folder, "--max_new_tokens", "4")
    assert sizes == [2] * 6
    assert result["speed"]["batch_size"] == 2
    assert "out of memory: going on with batches of 4" in capfd.readouterr().out
    files = [Path(one["answers_file"]).read_text() for one in (one_by_one, result)]
    assert files[0] == files[1]
    with pytest.raises(FlagError, match="--batch-size 3: the device ran out of memory"):
        run("mme", checkpoint, folder, "--batch-size", "3", "--experiment", "three")
    room = 0
    with pytest.raises(FlagError, match="too little memory for a single question"):
        run("mme", checkpoint, folder, "--experiment", "none")


def test_unknown_benchmarks_are_refused() -> None:
    with pytest.raises(FlagError, match="no benchmark 'vqa'; there are vqav2"):
        find("vqa")
    with pytest.raises(SystemExit):
        engine.build_parser().parse_args(["vqa", "--model-path", "x"])


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("10", "10.5", True),
        ("9.5", "10", True),
        ("9.49", "10", False),
        ("12%", "0.12", True),
        ("12", "12%", False),
        ("-3", "-3.1", True),
        ("0", "0.0", True),
        ("0.001", "0", False),
        ("Blue ", "blue", True),
        ("blue.", "blue", False),
        ("", "0", False),
    ],
)
def test_relaxed_match(answer: str, label: str, right: bool) -> None:
    assert eval_chartqa.relaxed_match(answer, label) is right


@pytest.mark.slow
def test_several_processes(checkpoint: Path, folder: Path) -> None:
    """Two processes share the questions; answers and scores are those of one."""
    common = ["--model-path", str(checkpoint), "--data-dir", str(folder), "--device", "cpu", *SHORT]
    alone = engine.main(["textvqa", *common, "--experiment", "alone"])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun(2), "-m", "llava.eval", "textvqa", *common, "--experiment", "shared"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = Path(alone["answers_file"])
    shared = answers.with_name("shared.jsonl")
    assert shared.read_bytes() == answers.read_bytes()
    result = json.loads(shared.with_name("shared.result.json").read_text())
    assert result["metrics"] == alone["metrics"]
    parts = [shared.with_name(f"shared.{rank}-of-2.jsonl").read_text() for rank in (0, 1)]
    assert all(parts)
    assert "".join(parts) == shared.read_text()
    assert done.stdout.count("TextVQA (") == 1, "one process reports"


def test_processes_and_chunks_exclude_each_other(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "joined", lambda: contextlib.nullcontext(Processes(rank=1, count=2)))
    with pytest.raises(FlagError, match="--num-chunks 3: torchrun has 2 processes"):
        run("textvqa", checkpoint, folder, "--num-chunks", "3")
