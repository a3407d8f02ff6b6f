"""Evaluation programs meet a foreign answers file, or are given an input for one: nothing changes, nothing loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.errors import LlavaError
from llava.eval import __main__ as engine
from llava.eval import long_answers, model_vqa, model_vqa_loader, model_vqa_science
from llava.eval.answering import question_run as program
from llava.eval.benchmarks import BENCHMARKS
from mma.lavin import answering, eval_mme
from mma.lavin import eval as mma_eval
from tests.golden import golden_dir
from tests.llava.eval import benchmark_data
from tests.reliability.hostile_files import FOREIGN, corpus
from tests.reliability.snapshots import snapshot

CORPUS = corpus()
CHECKPOINT = str(golden_dir("llava") / "tiny-llava-v1.5")
MODEL = ("--model-path", CHECKPOINT, "--device", "cpu")
NAMES = [name for name in BENCHMARKS if not name.startswith("mmbench")]  # its extra may be missing


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_data.build(tmp_path_factory.mktemp("eval"))


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    for module in (program, long_answers, answering):
        monkeypatch.setattr(module, "load_model", load)


def refused(folder: Path, work: Callable[[], Any], *words: str) -> None:
    before = snapshot(folder)
    with pytest.raises(LlavaError) as error:
        work()
    assert snapshot(folder) == before
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_benchmarks_leave_foreign_files_alone(name: str, data: Path, tmp_path: Path) -> None:
    for kind in FOREIGN:
        path = tmp_path / f"{kind}.jsonl"
        path.write_bytes(CORPUS[f"{kind} 0"])
        words = [name, *MODEL, "--data-dir", str(data), "--answers-file", str(path)]
        for more in ([], ["--restart"]):
            refused(tmp_path, lambda words=words, more=more: engine.main([*words, *more]), "it looks like")


@pytest.mark.parametrize("name", NAMES)
def test_benchmarks_do_not_answer_into_their_questions(name: str, data: Path) -> None:
    benchmark = BENCHMARKS[name]
    questions = data / benchmark.folder / benchmark.questions.format(split=benchmark.splits[0], model="")
    words = [name, *MODEL, "--data-dir", str(data), "--restart", "--answers-file"]
    said = "is a directory" if questions.is_dir() else "is also --question-file"
    refused(data, lambda: engine.main([*words, str(questions)]), said)
    refused(data, lambda: engine.main([*words, str(data / benchmark.folder)]), "is a directory")
    for written in (".result.json", ".samples.jsonl"):  # written next to the answers
        taken = data / f"taken{written}"
        if questions.is_file():
            taken.hardlink_to(questions)
            refused(data, lambda: engine.main([*words, str(data / "taken.jsonl")]), "would write")
            taken.unlink()


SINGLE = {
    "model_vqa_loader": (model_vqa_loader.main, "textvqa/llava_textvqa_val_v051_ocr.jsonl"),
    "model_vqa": (model_vqa.main, "textvqa/llava_textvqa_val_v051_ocr.jsonl"),
    "model_vqa_science": (model_vqa_science.main, "scienceqa/llava_test_CQM-A.json"),
}


@pytest.mark.parametrize("name", SINGLE)
def test_programs_leave_foreign_files_alone(name: str, data: Path, tmp_path: Path) -> None:
    main, questions = SINGLE[name]
    words = [*MODEL, "--question-file", str(data / questions), "--answers-file"]
    for kind in FOREIGN:
        path = tmp_path / "a.jsonl"
        path.write_bytes(CORPUS[f"{kind} 1"])
        refused(tmp_path, lambda path=path: main([*words, str(path)]), "it looks like")
    refused(data, lambda: main([*words, str(data / questions)]), "is also --question-file")
    refused(tmp_path, lambda: main([*words, ""]), "is empty")


def lavin_words(folder: Path, output: str) -> list[str]:
    return [
        *("--ckpt_dir", str(folder / "weights"), "--adapter_path", str(folder / "adapters"), "--output_dir", output),
        *("--device", "cpu", "--max_batch_size", "1", "--max_seq_len", "512"),
    ]


@pytest.fixture
def lavin(tmp_path: Path) -> Path:
    """What the two programs of LaVIN read before they load anything."""
    for name in ("weights/7B", "adapters", "data/images/test", "mme/existence", "work"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights/7B/params.json").write_text("{}")
    (tmp_path / "adapters/config.json").write_text("{}")
    problem = '{"question": "Q?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": null, "lecture": "",'
    problem += ' "solution": "", "split": "test", "subject": "s", "grade": "grade1", "topic": "t"}'
    (tmp_path / "data/problems.json").write_text(f'{{"1": {problem}}}')
    (tmp_path / "data/pid_splits.json").write_text('{"test": ["1"]}')
    (tmp_path / "mme/existence/1.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    (tmp_path / "mme/existence/1.jpg").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("program_name", ["mma.eval", "mma.eval_mme"])
def test_lavin_leaves_foreign_files_alone(program_name: str, lavin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lavin / "work")

    def run(output: str) -> Any:
        words = lavin_words(lavin, output)
        if program_name == "mma.eval":
            return mma_eval.main([*words, "--data_root", str(lavin / "data"), "--split", "test"])
        return eval_mme.main([*words, "--root_dir_", str(lavin / "mme")])

    (lavin / "out").mkdir()
    for kind in FOREIGN:
        (lavin / "out" / "answers.jsonl").write_bytes(CORPUS[f"{kind} 2"])
        refused(lavin, lambda: run(str(lavin / "out")), "it looks like")
    images = ["data", "data/images", "data/images/test"] if program_name == "mma.eval" else ["mme", "mme/existence"]
    for name in ["weights", "weights/7B/out", "adapters", *images, ""]:
        refused(lavin, lambda name=name: run(str(lavin / name)), "--output_dir")
    for output in ("", ".", "..", "/"):
        refused(lavin, lambda output=output: run(output), "--output_dir")
