"""The golden checkpoint and questions of mixed kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval.answering import question_run as program
from llava.eval.answering import runner
from llava.eval.answering.loading import LoadedModel, load_model
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir
from tests.llava.eval import benchmark_data

QUESTIONS: list[dict[str, Any]] = [
    {
        "question_id": 0,
        "image": "im0.png",
        "text": "What is shown?\nAnswer the question using a single word or phrase.",
    },
    {"question_id": 1, "image": "im1.png", "text": "How many dogs are there?"},
    {"question_id": 2, "text": "What is a lake?"},
    {"question_id": 3, "image": "im3.png", "text": "Is it red?\nAnswer yes or no."},
    {
        "question_id": 4,
        "text": "Is the sky red, or is it twice as large as the lake? Answer with the longest word of all.",
    },
    {"question_id": 5, "image": ["im2.png", "im4.png"], "text": "Compare."},
    {"question_id": 6, "image": "im4.png", "text": "Read the sign."},
]
"""Prompts of many lengths: text only, one image, two images; the images differ in size, one is grey."""


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return golden_dir("llava") / "tiny-llava-v1.5"


@pytest.fixture(scope="session")
def image_folder() -> Path:
    return golden_dir("llava") / "data" / "images"


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(str(checkpoint), device="cpu")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Path]:
    """The plain model, and one with an extension."""
    return {"llava": checkpoint, "sparse": write_sparse_checkpoint(tmp_path_factory.mktemp("sparse"))}


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, Path], loaded: LoadedModel) -> dict[str, LoadedModel]:
    return {"llava": loaded, "sparse": load_model(str(checkpoints["sparse"]), device="cpu")}


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every benchmark in small, in the published layout."""
    return benchmark_data.build(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def folder(benchmarks: Path, tmp_path: Path) -> Path:
    """The same, to be written into."""
    return Path(shutil.copytree(benchmarks, tmp_path / "eval"))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every question be answered alike, without a model."""

    def all_alike(text: str) -> None:
        def answer(answers: Any, *_: Any, **__: Any) -> runner.Speed:
            answers.append(dict.fromkeys(answers.pending, text))
            return runner.Speed(questions=len(answers.rows), images=1, seconds=1.0)

        monkeypatch.setattr(program, "load_model", lambda *_, **__: None)
        monkeypatch.setattr(program, "answer_tasks", answer)

    return all_alike
