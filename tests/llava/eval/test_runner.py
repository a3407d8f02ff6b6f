"""Batched answers: those of the original program, and the same whatever the batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.images import load_image
from llava.errors import BadImageError
from llava.eval import model_vqa_science
from llava.eval.answering import runner
from llava.eval.answering.answers import AnswersFile, Task, ToRow, answer_row
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.questions import get_chunk, read_questions
from llava.eval.model_vqa_loader import make_task
from llava.eval.scoring import mmbench
from tests.golden import golden_dir

METRICS = golden_dir("metrics") / "runners"
RECORDED_TOKENS = 8
"""Limit that was in force when the golden answers were recorded."""

RUNS = json.loads((METRICS / "expected_runs.json").read_text(encoding="utf-8"))["runs"]
IMAGES = golden_dir("llava") / "data" / "images"


class Spy:
    """Records the calls of `generate`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
        self.calls: list[dict[str, Any]] = []
        generate = loaded.model.generate

        def recorded(inputs: Tensor, **arguments: Any) -> Tensor:
            self.calls.append({"inputs": inputs, **arguments})
            return generate(inputs, **arguments)

        monkeypatch.setattr(loaded.model, "generate", recorded)


def prompt_ids(call: dict[str, Any]) -> list[Tensor]:
    """The rows of a recorded call without their padding."""
    return [row[mask] for row, mask in zip(call["inputs"], call["attention_mask"], strict=True)]


def ask(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    path: Path,
    image_folder: Path,
    *,
    batch_size: int = 1,
    conv_mode: str = "vicuna_v1",
    open_image: runner.OpenImage | None = None,
    to_row: ToRow = answer_row,
    **options: Any,
) -> list[str]:
    """The answer texts of a new answers file."""
    answers = AnswersFile(path, tasks, model_id=loaded.name, settings={}, to_row=to_row, restart=True)
    runner.answer_tasks(
        answers,
        loaded,
        open_image or (lambda name, where: load_image(image_folder, name, row=where)),
        GenerationOptions(**{"temperature": 0.0, "max_new_tokens": 12} | options),
        conv_mode=conv_mode,
        batch_size=batch_size,
    )
    answers.finish()
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def tasks(question_file: Path) -> list[Task]:
    return [make_task(question) for question in read_questions(question_file)]


@pytest.fixture(scope="module")
def random_model(loaded: LoadedModel) -> LoadedModel:
    """The golden model with large random weights: its answers vary more and depend on every position."""
    model = copy.deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return LoadedModel("random", loaded.tokenizer, model, loaded.image_processor)


@pytest.fixture(params=["golden", "random"])
def either(request: pytest.FixtureRequest, loaded: LoadedModel, random_model: LoadedModel) -> LoadedModel:
    return {"golden": loaded, "random": random_model}[request.param]


def test_the_golden_runs_are_there() -> None:
    assert [(run["script"], run["conv_mode"], "config" in run) for run in RUNS] == [
        ("model_vqa_loader", "vicuna_v1", False),
        ("model_vqa_loader", "llava_v0", False),
        ("model_vqa", "llava_v1", False),
        ("model_vqa", "llava_v1", True),
        ("model_vqa_science", "vicuna_v1", False),
        ("model_vqa_science", "llava_v0", False),
        ("model_vqa_mmbench", "vicuna_v1", False),
        ("model_vqa_mmbench", "vicuna_v1", False),
        ("model_vqa_mmbench", "llava_v1", False),
    ]


def asked_by(run: dict[str, Any]) -> tuple[Sequence[Task], dict[str, Any]]:
    """The tasks of a recorded run, and how its program opens images and writes rows."""
    path, options = METRICS / "input" / run["q"], run["kw"]
    if run["script"] == "model_vqa_science":
        return model_vqa_science.read_tasks(path, single_pred_prompt=options["single_pred_prompt"]), {}
    if run["script"] == "model_vqa_mmbench":
        pytest.importorskip("pandas", reason="the extra `eval` is not installed")
        flags = {name: options[name] for name in ("all_rounds", "single_pred_prompt", "lang")}
        return mmbench.read_tasks(path, **flags), {"open_image": mmbench.open_image, "to_row": mmbench.to_row}
    chunk = (options.get("num_chunks", 1), options.get("chunk_idx", 0))
    return [make_task(question) for question in get_chunk(read_questions(path), *chunk)], {}


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("run", RUNS, ids=[f"{run['script']}-{number}" for number, run in enumerate(RUNS)])
def test_answers_of_the_original_program(
    run: dict[str, Any], batch_size: int, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in run.get("config", {}).items():
        monkeypatch.setattr(loaded.model.config, name, value, raising=False)
    spy = Spy(monkeypatch, loaded)
    asked, program = asked_by(run)
    path = tmp_path / "a.jsonl"
    short = {"batch_size": batch_size, "conv_mode": run["conv_mode"], "max_new_tokens": RECORDED_TOKENS}
    ask(loaded, asked, path, IMAGES, **program, **short)
    rows = [json.loads(line) | {"answer_id": "<random>"} for line in path.read_text().splitlines()]
    assert rows == run["answers"]
    assert [list(row) for row in rows] == [list(answer) for answer in run["answers"]]
    rows = [row.tolist() for call in spy.calls for row in prompt_ids(call)]
    assert sorted(rows) == sorted(call["prompt_ids"] for call in run["generate_calls"])
    if any(call["images"] is None for call in run["generate_calls"]):
        return  # in a batch, a row without an image has a dummy
    sizes = [list(size) for call in spy.calls for size in call["image_sizes"]]
    assert sorted(sizes) == sorted(call["image_sizes"][0] for call in run["generate_calls"])
    assert all(list(call["images"].shape[1:]) == run["generate_calls"][0]["images"][1:] for call in spy.calls)


OPTIONS = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"temperature": 1.0, "top_p": 0.9, "seed": 3}}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_batch_size_does_not_change_the_answers(
    options: str, either: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path
) -> None:
    # Measured in fp32 over 12 greedy tokens: batching moves a logit by at most 2e-5, and the best token leads by at
    # least 1.2e-3, so equal texts are no luck. In 16-bit types rounding may change an answer.
    single = ask(either, tasks, tmp_path / "a.jsonl", image_folder, **OPTIONS[options])
    assert len(set(single)) > 3  # answers that are all alike would show nothing
    for batch_size in (3, 7):
        batched = ask(either, tasks, tmp_path / "a.jsonl", image_folder, batch_size=batch_size, **OPTIONS[options])
        assert batched == single


def test_the_order_of_the_questions_does_not_change_the_answers(
    random_model: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path
) -> None:
    there = ask(random_model, tasks, tmp_path / "a.jsonl", image_folder, batch_size=3)
    assert ask(random_model, tasks[::-1], tmp_path / "b.jsonl", image_folder, batch_size=3) == there[::-1]


def test_seed_and_temperature_matter(
    random_model: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path
) -> None:
    answers = [
        tuple(ask(random_model, tasks, tmp_path / "a.jsonl", image_folder, batch_size=7, **options))
        for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1})
    ]
    assert len(set(answers)) == 3
    assert answers[0] == tuple(ask(random_model, tasks, tmp_path / "a.jsonl", image_folder, batch_size=7, seed=1))


def test_without_the_mask_batches_would_differ(
    random_model: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: these questions do notice padding that is not masked."""
    single = ask(random_model, tasks, tmp_path / "a.jsonl", image_folder)
    pad_left = runner.pad_left

    def unmasked(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
        input_ids, mask = pad_left(rows, pad)
        return input_ids, torch.ones_like(mask)

    monkeypatch.setattr(runner, "pad_left", unmasked)
    assert ask(random_model, tasks, tmp_path / "a.jsonl", image_folder, batch_size=7) != single


def test_every_row_sees_its_own_image(
    random_model: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: with the images in another order, exactly the rows with an image change."""
    right = ask(random_model, tasks, tmp_path / "a.jsonl", image_folder, batch_size=7)
    image_arguments = runner.image_arguments

    def turned(images: Any, loaded: LoadedModel) -> dict[str, Any]:
        arguments = image_arguments(images, loaded)
        return arguments | {"images": arguments["images"].roll(1, 0)}

    monkeypatch.setattr(runner, "image_arguments", turned)
    wrong = ask(random_model, tasks, tmp_path / "a.jsonl", image_folder, batch_size=7)
    changed = [task.question_id for task, one, other in zip(tasks, right, wrong, strict=True) if one != other]
    assert set(changed) >= {0, 1, 3, 6}
    assert not set(changed) & {2, 4}


def test_text_only_rows_take_a_dummy_beside_images_and_nothing_alone(
    loaded: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch, loaded)
    ask(loaded, tasks, tmp_path / "a.jsonl", image_folder, batch_size=7)
    ask(loaded, [tasks[2], tasks[4]], tmp_path / "a.jsonl", image_folder, batch_size=2)
    mixed, text_only = spy.calls
    assert mixed["images"].shape == (8, 3, 28, 28)  # four single images, two of one question, two dummies
    assert len(mixed["image_sizes"]) == 8
    assert (mixed["images"].flatten(1).abs().sum(1) == 0).sum() == 2
    assert text_only["images"] is None


def test_batches_are_sorted_by_length_and_padded_on_the_left(
    loaded: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch, loaded)
    ask(loaded, tasks, tmp_path / "a.jsonl", image_folder, batch_size=3)
    assert [len(call["inputs"]) for call in spy.calls] == [3, 3, 1]
    patches = loaded.patches_per_image
    lengths = [
        len(row) + int((row == IMAGE_TOKEN_INDEX).sum()) * (patches - 1)
        for call in spy.calls
        for row in prompt_ids(call)
    ]
    assert lengths == sorted(lengths, reverse=True)
    for call in spy.calls:
        assert call["attention_mask"][:, -1].all()
        assert (call["inputs"][~call["attention_mask"]] == loaded.tokenizer.pad_token_id).all()


def test_a_bad_image_names_row_and_file(loaded: LoadedModel, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    for name in ("broken.png", "absent.png"):
        asked = [Task(0, "A?", "A?", ("good.png",), "q.jsonl:1"), Task(1, "B?", "B?", (name,), "q.jsonl:2")]
        with pytest.raises(BadImageError) as error:
            ask(loaded, asked, tmp_path / "a.jsonl", tmp_path)
        assert "q.jsonl:2" in str(error.value)
        assert name in str(error.value)


def test_a_prompt_that_will_be_cut_is_pointed_out(
    loaded: LoadedModel, tasks: list[Task], tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = runner.make_prompt("0", tasks[0], loaded, "vicuna_v1").length
    monkeypatch.setattr(loaded.model.config, "tokenizer_model_max_length", length)
    ask(loaded, tasks[:1], tmp_path / "a.jsonl", image_folder)  # just fits: no warning, which would be an error
    monkeypatch.setattr(loaded.model.config, "tokenizer_model_max_length", length - 1)
    with pytest.warns(
        UserWarning, match=rf"questions\.jsonl:1: the prompt has {length} positions, the model keeps {length - 1}"
    ):
        ask(loaded, tasks[:1], tmp_path / "a.jsonl", image_folder)
