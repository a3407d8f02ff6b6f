"""A Git LFS pointer in the place of data is called that by every program that reads the file."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydralora import components
from hydralora.original import read_weights
from hydralora.text.options import number_of_experts
from hydralora.text.samples import read_samples
from llava.data import check
from llava.data.images import image_size, load_image
from llava.data.rows import open_rows
from llava.eval import (
    eval_captions,
    eval_chartqa,
    eval_gqa,
    eval_mme,
    eval_pope,
    eval_qbench,
    eval_science_qa,
    eval_seed,
    eval_textvqa,
    score,
    summarize_gpt_review,
)
from llava.eval.answering.answers import ANSWER_SHAPES
from llava.eval.answering.questions import read_questions
from llava.eval.answering.recognition import recognize_rows
from llava.eval.run_llava import open_image
from llava.eval.scoring import mmbench, sqa_to_llava, submission
from llava.eval.scoring.references import read_conversations
from llava.runtime import zero
from mma.lavin.data import mixture
from mma.lavin.data.instructions import read_mixture
from mma.lavin.data.scienceqa import read_split
from mma.lavin.scoring.mme import LabelSource, read_benchmark
from tests.golden import golden_dir
from tests.reliability.damage import POINTER
from tests.reliability.programs import Program

Reader = Callable[[Path], Any]
"""Reads the file at a path; what else it needs is in the folder."""

GOOD_LINE = '{"question_id": 1, "text": "a", "prompt": "b", "label": "yes", "category": "c", "image": "x.png"}\n'


def science(path: Path) -> Any:
    return read_split(path.parent, "train", path.parent / "captions.json")


def other(path: Path) -> str:
    """A readable file next to the one that is tried."""
    return str(path.parent / "other.jsonl")


READERS: dict[str, tuple[str, Reader]] = {
    "training list": ("data.json", open_rows),
    "training lines": ("data.jsonl", open_rows),
    "one of several": ("data.jsonl", lambda path: open_rows([other(path), path])),
    "data.check": ("data.json", lambda path: check.main([str(path), "--model_name_or_path", CHECKED])),
    "instructions": ("train.json", read_samples),
    "components": ("train.json", lambda path: components.read_texts([path])),
    "number of experts": ("components.json", lambda path: number_of_experts(f"auto:{path}")),
    "settings of DeepSpeed": ("zero2.json", lambda path: zero._read(str(path))),
    "weights of the original": ("non_lora_trainables.bin", read_weights),
    "questions": ("questions.jsonl", read_questions),
    "long answers' references": ("references.json", read_conversations),
    "answers to continue": ("answers.jsonl", lambda path: recognize_rows(path, ANSWER_SHAPES)),
    "answers, leniently": ("answers.jsonl", submission.read_answers_leniently),
    "score, questions": (
        "questions.jsonl",
        lambda path: score.main(["--question-file", str(path), "--answers-file", other(path)]),
    ),
    "score, answers": (
        "answers.jsonl",
        lambda path: score.main(["--question-file", other(path), "--answers-file", str(path)]),
    ),
    "GQA, truths": ("truths.json", lambda path: eval_gqa.evaluate(path, other(path))),
    "GQA, predictions": ("predictions.json", lambda path: eval_gqa.read_predictions(path, [], "questions.json", ())),
    "GQA, answers": ("answers.jsonl", lambda path: submission.gqa(path, path.parent / "new.json")),
    "MME, results": ("existence.txt", eval_mme.read_task),
    "MME, truths": (
        "existence/one.txt",
        lambda path: submission.mme(path.parents[1], path.parents[1] / "other.jsonl", path.parents[2] / "new"),
    ),
    "MME of mma": ("existence/one.txt", lambda path: read_benchmark(path.parents[1], LabelSource.FILE)),
    "POPE, labels": ("coco_pope_random.json", eval_pope.read_labels),
    "Q-Bench": ("answers.jsonl", lambda path: eval_qbench.main(["--result-file", str(path)])),
    "ScienceQA, problems": (
        "problems.json",
        lambda path: eval_science_qa.main(
            [
                *("--base-dir", str(path.parent), "--result-file", other(path), "--split", "train"),
                *("--output-file", str(path.parent / "a"), "--output-result", str(path.parent / "b")),
            ]
        ),
    ),
    "ScienceQA, converted": ("pid_splits.json", lambda path: sqa_to_llava.read_split(path.parent, "train")),
    "SEED": ("SEED.json", lambda path: eval_seed.evaluate(path, other(path), path.parent / "new.json")),
    "TextVQA": ("annotation.json", lambda path: eval_textvqa.eval_single(path, other(path))),
    "ChartQA": ("test_human.json", lambda path: eval_chartqa.read_tasks(path.parent)),
    "captions": ("annotation.json", eval_captions.read_tasks),
    "MMBench": ("mmbench.tsv", mmbench.read_table),
    "reviews": ("review.jsonl", summarize_gpt_review.relative_scores),
    "mma, problems": ("problems.json", science),
    "mma, splits": ("pid_splits.json", science),
    "mma, captions": ("captions.json", science),
    "mma, mixture": ("all_data.json", lambda path: read_mixture(path.parent)),
    "mma, Alpaca": ("alpaca_data.json", lambda path: list(mixture.alpaca_items(path))),
    "mma, LLaVA": ("complex_reasoning_77k.json", lambda path: list(mixture.llava_items(path.parent))),
    "image": ("im0.png", lambda path: load_image(path.parent, path.name, "row 0")),
    "size of an image": ("im0.png", lambda path: image_size(path.parent, path.name, "row 0")),
    "image of run_llava": ("im0.png", lambda path: open_image(str(path), "--image-file")),
}
CHECKED = str(golden_dir("llava") / "tiny-llava-v1.5")


def place(folder: Path, name: str) -> Path:
    """A folder with what the readers need besides the file of this name, which is not there yet."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "other.jsonl").write_text(GOOD_LINE)
    for needed, content in (("pid_splits.json", '{"train": ["1"]}'), ("problems.json", '{"1": {}}')):
        (folder / needed).write_text(content)
    (folder / "captions.json").write_text('{"captions": {}}')
    if path.parent != folder:
        shutil.copyfile(golden_dir("llava") / "data" / "images" / "im0.png", path.with_suffix(".png"))
    return path


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_called_that(name: str, tmp_path: Path) -> None:
    if name == "MMBench" and importlib.util.find_spec("pandas") is None:
        pytest.skip("pandas is not installed")
    file, read = READERS[name]
    path = place(tmp_path / "data", file)
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{path.name}.*a Git LFS pointer.*git lfs pull"):
        read(path)
    assert path.read_text() == POINTER


@pytest.mark.parametrize("name", READERS)
def test_other_text_is_not(name: str, tmp_path: Path) -> None:
    """Negative control."""
    if name == "MMBench" and importlib.util.find_spec("pandas") is None:
        pytest.skip("pandas is not installed")
    file, read = READERS[name]
    path = place(tmp_path / "data", file)
    path.write_text("version 2 of a text that mentions git-lfs\n")
    said = ""
    try:
        read(path)
    except (ValueError, SystemExit) as error:
        said = str(error)
    assert "Git LFS" not in said


DATA = {
    "llava.train.train": ("data_path", ("data.json",)),
    "mma.train": ("data_root", ("problems.json", "pid_splits.json")),
    "hydralora.finetune": ("dataset_dir", ("train.json",)),
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, (_, files) in DATA.items() for file in files])
def test_training_programs(name: str, file: str, training_programs: dict[str, Program], tmp_path: Path) -> None:
    """Nothing is trained, and nothing is left in the output folder but the record of the run."""
    program, (flag, _) = training_programs[name], DATA[name]
    words = program.words(tmp_path / "out", {})
    usual = Path(words[words.index(f"--{flag}") + 1])
    path = shutil.copytree(usual if usual.is_dir() else usual.parent, tmp_path / "data") / file
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file}: is a Git LFS pointer.*git lfs pull"):
        program.run(tmp_path / "out", **{flag: path if flag == "data_path" else path.parent})
    assert {each.name for each in (tmp_path / "out").glob("*")} <= {"run.json"}
