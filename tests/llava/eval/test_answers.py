"""The answers file survives interruptions, and refuses to mix what does not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.answers import AnswersFile, Task, answer_row, refuse_other_settings
from llava.eval.answering.processes import Processes, part_of, put_together
from llava.runtime.weights.fingerprint import weights_fingerprint


def task(number: int, text: str | None = None, images: tuple[str, ...] = ()) -> Task:
    text = f"Question {number}?" if text is None else text
    return Task(number, text, text, images, where=f"q.jsonl:{number + 1}")


TASKS = [task(number) for number in range(5)]
SETTINGS = {"weights": "abc", "temperature": 0.0}


def open_answers(path: Path, tasks: list[Task] = TASKS, **changes: Any) -> AnswersFile:
    return AnswersFile(path, tasks, **{"model_id": "tiny", "settings": SETTINGS} | changes)


def answer_all(answers: AnswersFile) -> list[int]:
    """Answer what is pending, last question first, and return the ids that were asked."""
    asked = []
    for key, pending in reversed(answers.pending.items()):
        answers.append({key: f"answer {pending.question_id}"})
        asked.append(pending.question_id)
    answers.finish()
    return asked


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "a.jsonl"
    assert answer_all(open_answers(path)) == [4, 3, 2, 1, 0]
    return path


def test_rows_are_in_question_order_with_the_original_keys(finished: Path) -> None:
    assert [row["question_id"] for row in rows(finished)] == [0, 1, 2, 3, 4]
    row = rows(finished)[1]
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (row["prompt"], row["text"], row["model_id"], row["metadata"]) == ("Question 1?", "answer 1", "tiny", {})
    assert len({row["answer_id"] for row in rows(finished)}) == 5
    assert sorted(path.name for path in finished.parent.iterdir()) == ["a.jsonl", "a.jsonl.run.json"]


@pytest.mark.parametrize("cut", [1, 2, 40, "line", "line+1", "all"])
def test_a_cut_file_is_completed_to_the_same_bytes(finished: Path, cut: int | str) -> None:
    whole = finished.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    lost = {"line": last, "line+1": last + 1, "all": len(whole)}.get(cut, cut)
    finished.write_bytes(whole[: len(whole) - lost])
    # Without its line feed alone, the last line is complete.
    expected = {1: [], 2: [4], 40: [4], "line": [4], "line+1": [4], "all": [4, 3, 2, 1, 0]}[cut]
    assert answer_all(open_answers(finished)) == expected
    assert finished.read_bytes() == whole


class First(Processes):
    """The first of several processes, when the others have arrived."""

    def wait(self) -> None:
        """Nobody is missing."""


def test_parts_of_several_processes_become_one_file_with_their_settings(finished: Path) -> None:
    """Settings of an earlier run beside the file would have it taken for what it is not, or refused for that."""
    other = SETTINGS | {"weights": "def"}
    for rank in (0, 1):
        tasks = list(Processes(rank, 2).part(TASKS))
        answer_all(open_answers(part_of(finished, rank, 2), tasks, settings=other, model_id="other"))
    put_together(First(0, 2), finished)
    assert open_answers(finished, settings=other, model_id="other").pending == {}
    assert [row["model_id"] for row in rows(finished)] == ["other"] * 5
    for settings in (SETTINGS, other | {"temperature": 1.0}):
        with pytest.raises(FlagError, match="made with other settings"):
            refuse_other_settings(finished, settings)
    part_of(finished, 1, 2).unlink()
    with pytest.raises(FlagError, match=r"has no \['a\.1-of-2\.jsonl'\]; several machines"):
        put_together(First(0, 2), finished)


def test_kept_answers_are_kept_as_they_are(finished: Path) -> None:
    kept = [row | {"text": "by hand"} for row in rows(finished)[2:4]]
    finished.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert answer_all(open_answers(finished)) == [4, 1, 0]
    assert [row["text"] for row in rows(finished)] == ["answer 0", "answer 1", "by hand", "by hand", "answer 4"]


def test_each_batch_is_on_disk_in_whole_lines(tmp_path: Path) -> None:
    answers = open_answers(tmp_path / "a.jsonl")
    for count, key in enumerate(list(answers.pending), start=1):
        answers.append({key: "line one\nline two"})
        content = (tmp_path / "a.jsonl").read_text()
        assert content.endswith("\n")
        assert content.count("\n") == count


def test_an_unfinished_file_is_not_finished(tmp_path: Path) -> None:
    answers = open_answers(tmp_path / "a.jsonl")
    answers.append({next(iter(answers.pending)): "one"})
    with pytest.raises(RuntimeError, match="4 of 5 questions"):
        answers.finish()


def test_restart_replaces_the_answers(finished: Path) -> None:
    assert answer_all(open_answers(finished, restart=True)) == [4, 3, 2, 1, 0]
    assert open_answers(finished).pending == {}


def test_a_file_without_settings_beside_it_is_continued(finished: Path) -> None:
    (finished.parent / "a.jsonl.run.json").unlink()
    finished.write_text("".join(json.dumps(row) + "\n" for row in rows(finished)[:2]))
    assert answer_all(open_answers(finished)) == [4, 3, 2]


def test_other_settings_are_refused_and_named(finished: Path) -> None:
    with pytest.raises(FlagError, match=r"temperature: 0\.0 then, 0\.2 now.*--restart"):
        open_answers(finished, settings=SETTINGS | {"temperature": 0.2})
    record = json.loads((finished.parent / "a.jsonl.run.json").read_text())
    assert record["settings"] == SETTINGS
    assert "torch" in record["versions"]


def test_answers_of_another_model_are_refused(finished: Path) -> None:
    with pytest.raises(FlagError, match=r"a\.jsonl:1: an answer of the model 'tiny', but this run asks 'other'"):
        open_answers(finished, model_id="other")


@pytest.mark.parametrize("change", [{"question_id": 77}, {"prompt": "Another question?"}], ids=str)
def test_answers_to_other_questions_are_refused(finished: Path, change: dict[str, Any]) -> None:
    changed = rows(finished)
    changed[2] |= change
    finished.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(BadSampleError, match=r"a\.jsonl:3: an answer to question_id"):
        open_answers(finished)


def test_two_answers_to_one_question_are_refused(finished: Path) -> None:
    finished.write_text(finished.read_text() + json.dumps(rows(finished)[0]) + "\n")
    with pytest.raises(BadSampleError, match=r"a\.jsonl:6: .* not so often"):
        open_answers(finished)


def test_a_broken_line_in_the_middle_is_an_error(finished: Path) -> None:
    lines = finished.read_text().splitlines(keepends=True)
    finished.write_text(lines[0] + lines[1][:30] + "\n" + "".join(lines[2:]))
    with pytest.raises(BadSampleError, match=r"a\.jsonl:2: not valid JSON"):
        open_answers(finished)


def test_one_id_may_have_several_questions(tmp_path: Path) -> None:
    """As in TextVQA, where the id is the image's; equal questions are answered as often as they are asked."""
    tasks = [task(7, "What?"), task(7, "Who?"), task(7, "What?")]
    answers = open_answers(tmp_path / "a.jsonl", tasks)
    answers.append({list(answers.pending)[2]: "third"})
    assert [pending.question for pending in open_answers(tmp_path / "a.jsonl", tasks).pending.values()] == [
        "Who?",
        "What?",
    ]
    answer_all(answers)
    assert [row["prompt"] for row in rows(tmp_path / "a.jsonl")] == ["What?", "Who?", "What?"]


def test_questions_that_only_differ_in_the_image_need_ids(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"same question_id 7 and text as q\.jsonl:8, but other images"):
        open_answers(tmp_path / "a.jsonl", [task(7, "What?", ("a.png",)), task(7, "What?", ("b.png",))])


def test_programs_may_add_to_the_rows(tmp_path: Path) -> None:
    """Rounds of one question (MMBench) are told apart by `round_id`."""
    tasks = [task(1, "What?", (f"{number}",)) for number in range(2)]

    def with_round(asked: Task, text: str, model_id: str) -> dict[str, Any]:
        return answer_row(asked, text, model_id) | {"round_id": int(asked.images[0])}

    answers = open_answers(tmp_path / "a.jsonl", tasks, to_row=with_round)
    answer_all(answers)
    assert [row["round_id"] for row in rows(tmp_path / "a.jsonl")] == [0, 1]
    assert open_answers(tmp_path / "a.jsonl", tasks, to_row=with_round).pending == {}


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "extensions" / "x").mkdir(parents=True)
    (folder / "checkpoint-1").mkdir()
    big = bytes(range(256)) * 12000  # three MiB: only its ends are read
    (folder / "model.safetensors").write_bytes(big)
    (folder / "extensions" / "x" / "model.safetensors").write_bytes(b"x")
    seen = {weights_fingerprint(folder)}
    (folder / "notes.txt").write_text("not a weight")
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"a checkpoint of its own")
    assert seen == {weights_fingerprint(folder)}
    for change in (
        lambda: (folder / "model.safetensors").write_bytes(big[:-1] + b"!"),
        lambda: (folder / "model.safetensors").write_bytes(big + b"!"),
        lambda: (folder / "extensions" / "x" / "model.safetensors").write_bytes(b"y"),
        lambda: (folder / "mm_projector.bin").write_bytes(b"z"),
    ):
        change()
        seen.add(weights_fingerprint(folder))
    assert len(seen) == 5
    assert weights_fingerprint("facebook/opt-350m") is None
    assert weights_fingerprint(None) is None
