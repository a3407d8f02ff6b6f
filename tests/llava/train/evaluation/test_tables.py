"""What wandb (offline) and TensorBoard get of the answers, and what `--eval_questions` reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.outcomes import Outcome
from llava.train.evaluation.options import EvaluationArguments
from llava.train.evaluation.questions import question_sets
from llava.train.evaluation.scores import shown_answers
from llava.train.evaluation.tables import ShownAnswer, show_answers
from llava.train.train import main
from tests.llava.train.evaluation.common import evaluated_line, evaluations, questions

SHOWN = [
    ShownAnswer("What | is\nit?", "a dog", "dog", 1.0, [Image.new("RGB", (900, 300), "red")]),
    ShownAnswer("And this?", "no idea", None, None, []),
    ShownAnswer("Both?", "red", "red", 1.0, [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (10, 40), "red")]),
]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in Markdown that names the images, at each evaluation."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra `train` is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "replaced below")
    options = {"report_to": "tensorboard", "logging_dir": tmp_path / "events", "eval_shown": 3}
    main(evaluated_line(tmp_path / "out", tmp_path, **options))
    events = event_accumulator.EventAccumulator(str(tmp_path / "events"), {"tensors": 0, "images": 0}).Reload()
    logged = events.Tags()
    assert {"eval/loss", "eval/image_loss", "eval/asked_accuracy", "train/samples_per_second"} <= set(logged["scalars"])
    tables = events.Tensors("eval/asked/answers/text_summary")
    assert [event.step for event in tables] == [2, 4]
    text = tables[0].tensor_proto.string_val[0].decode()
    rows = text.splitlines()
    assert len(rows) == 2 + 3
    assert "| What is it, 0? |" in rows[2]
    assert " | dog | " in rows[2]
    images = [name for name in logged["images"] if name.startswith("eval/asked/answers/")]
    assert images
    assert all(name in text for name in images)


def test_wandb(tmp_path: Path, offline_wandb: ModuleType) -> None:
    main(evaluated_line(tmp_path / "out", tmp_path, report_to="wandb", run_name="tiny", eval_shown=2))
    summary = dict(offline_wandb.run.summary)
    offline_wandb.finish()
    assert summary["eval/loss"] == pytest.approx(evaluations(tmp_path / "out")[-1]["eval_loss"])
    table = summary["eval/asked/answers"]
    assert (table["_type"], table["nrows"]) == ("table-file", 2)
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*/files/{table['path']}")
    stored = json.loads(file.read_text())
    assert stored["columns"] == ["update", "image", "question", "answer", "label", "score"]
    assert [row[0] for row in stored["data"]] == [4, 4]
    assert [row[2] for row in stored["data"]] == ["What is it, 0?", "What is it, 1?"]
    # The pixels are in the table's artifact; this file has the kind of a cell.
    assert [row[1] for row in stored["data"]] == ["Image", None]


def test_cells_stay_in_their_rows_and_images_are_small() -> None:
    class Writer:
        texts: list[str]
        images: dict[str, tuple[int, ...]]

        def __init__(self) -> None:
            self.texts, self.images = [], {}

        def add_text(self, tag: str, text: str, step: int) -> None:
            self.texts.append(text)

        def add_image(self, tag: str, array: object, step: int, dataformats: str) -> None:
            self.images[tag] = array.shape  # type: ignore[attr-defined]

    integrations = pytest.importorskip("transformers.integrations")
    writer = Writer()
    callback = integrations.TensorBoardCallback(tb_writer=writer)
    show_answers([callback], "asked", SHOWN, 7)
    assert writer.images == {"eval/asked/answers/1": (149, 448, 3), "eval/asked/answers/3": (40, 40, 3)}
    assert writer.texts[0].splitlines()[2:] == [
        "| 7 | eval/asked/answers/1 | What \\| is it? | a dog | dog | 1.0 |",
        "| 7 |  | And this? | no idea |  |  |",
        "| 7 | eval/asked/answers/3 | Both? | red | red | 1.0 |",
    ]


def test_a_file_without_labels_is_shown_and_not_scored(tmp_path: Path) -> None:
    path = questions(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))
    (asked,) = question_sets(EvaluationArguments(eval_questions=[str(path)], eval_limit=2), None)
    assert len(asked.tasks) == 2
    answers = [asked.to_row(task, "a cat", "training") for task in asked.tasks]
    outcome = asked.score(path, answers)
    assert outcome.metrics == {}
    assert isinstance(outcome, Outcome)
    without_images = EvaluationArguments(eval_questions=[str(path)], eval_image_folder=str(tmp_path))
    assert question_sets(without_images, None)[0].name == "asked"
    shown = shown_answers(asked, answers, outcome, 0)
    assert shown == []


def test_splits_and_limits_of_benchmarks(tmp_path: Path) -> None:
    folder = tmp_path / "scienceqa"
    folder.mkdir()
    turns = [{"from": "human", "value": "A or B?"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(number), "conversations": turns} for number in range(3)]
    (folder / "llava_val_CQM-A.json").write_text(json.dumps(rows))
    options = EvaluationArguments(eval_questions=["scienceqa:val"], eval_data_dir=str(tmp_path), eval_limit=2)
    (asked,) = question_sets(options, None)
    assert (asked.name, len(asked.tasks)) == ("scienceqa", 2)
    assert asked.max_new_tokens == BENCHMARKS["scienceqa"].max_new_tokens
