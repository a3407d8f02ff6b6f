"""Question files and chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import DEFAULT_CATEGORY, MissingChunkError, get_chunk, read_questions
from llava.eval.scoring import mmbench
from tests.golden import load_case

CHUNKS = load_case("metrics", "runner_helpers")[0]["out"]["chunks"]


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_the_golden_chunks_are_there() -> None:
    assert len(CHUNKS) == 7


@pytest.mark.parametrize("case", CHUNKS, ids=lambda case: f"{case['n_items']}-in-{case['num_chunks']}")
def test_chunks_are_those_of_the_original(case: dict[str, Any]) -> None:
    items = list(range(case["n_items"]))
    for index, expected in enumerate(case["chunks"]):
        if isinstance(expected, str):
            with pytest.raises({"IndexError": IndexError, "ValueError": ValueError}[expected]):
                get_chunk(items, case["num_chunks"], index)
        else:
            assert get_chunk(items, case["num_chunks"], index) == expected


def test_a_missing_chunk_names_the_numbers() -> None:
    with pytest.raises(MissingChunkError, match="5 questions in chunks of 2 make only 3 of the 4 chunks"):
        get_chunk(list(range(5)), 4, 3)


@pytest.mark.parametrize(("chunks", "index"), [(0, 0), (-1, 0), (2, 2), (2, -1)])
def test_chunk_flags_out_of_range_are_refused(chunks: int, index: int) -> None:
    with pytest.raises(FlagError, match=r"--num-chunks|--chunk-idx"):
        get_chunk([1, 2, 3], chunks, index)


def test_rows_with_and_without_optional_keys(tmp_path: Path) -> None:
    file = write(
        tmp_path / "q.jsonl",
        {"question_id": 3, "image": "a.png", "text": "A?", "category": "count", "label": 2},
        "",
        {"question_id": "x", "text": "Überall?"},
        {"question_id": 4, "text": "Two?", "image": ["a.png", "b.png"]},
        {"question_id": 5, "text": "None?", "image": None},
    )
    first, second, third, fourth = read_questions(file)
    assert (first.question_id, first.images, first.category, first.label) == (3, ("a.png",), "count", "2")
    assert (second.text, second.images, second.category, second.label) == ("Überall?", (), DEFAULT_CATEGORY, None)
    assert second.where == f"{file}:3"
    assert third.images == ("a.png", "b.png")
    assert fourth.images == ()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "A?"}, "has no 'question_id'"),
        ({"question_id": 1}, "has no 'text'"),
        ({"question_id": 1.5, "text": "A?"}, "'question_id' must be int or str, found 1.5"),
        ({"question_id": True, "text": "A?"}, "'question_id' must be int or str, found True"),
        ({"question_id": 1, "text": None}, "'text' must be str, found None"),
        ({"question_id": 1, "text": "A?", "image": 7}, "'image' must be"),
        ({"question_id": 1, "text": "A?", "image": ""}, "'image' must be"),
        ({"question_id": 1, "text": "A?", "label": ["a"]}, "'label' must be"),
        ('{"question_id": 1, "te', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    file = write(tmp_path / "q.jsonl", {"question_id": 0, "text": "fine"}, bad)
    with pytest.raises(BadSampleError, match=r"q\.jsonl:2: .*") as error:
        read_questions(file)
    assert message in str(error.value)


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(BadSampleError, match="no rows"):
        read_questions(write(tmp_path / "empty.jsonl", ""))


def test_cells_of_mmbench() -> None:
    """What counts as nothing, and how far the options of a row go."""
    case = load_case("metrics", "runner_helpers")[0]
    nan = float("nan")

    def cell(value: object) -> object:
        return nan if value == "__nan__" else value

    assert [mmbench.is_none(cell(value)) for value in case["in"]["is_none"]] == case["out"]["is_none"]
    rows = [{key: cell(value) for key, value in row.items()} for row in case["in"]["options"]]
    assert [mmbench.get_options(row) for row in rows] == case["out"]["options"]
