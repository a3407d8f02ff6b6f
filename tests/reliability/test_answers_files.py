"""A file that does not hold rows of answers is refused, byte for byte untouched; one that a kill tore is continued."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError, FlagError, LlavaError
from llava.eval import eval_gpt_review_bench, long_answers, merge, model_vqa_qbench
from llava.eval.answering.answers import AnswersFile, Task, ToRow, answer_row, settings_path
from llava.eval.answering.processes import Processes, part_of, put_together
from llava.eval.scoring import mmbench
from llava.eval.scoring import reviews as asked_reviews
from tests.reliability.hostile_files import DRAWS, FOREIGN, SEED, SPECIAL, corpus, spoiled_answers
from tests.reliability.snapshots import snapshot

SETTINGS = {"weights": "abc", "temperature": 0.0}
CORPUS = corpus()


def tasks_of(program: str) -> list[Task]:
    """Tasks with what the rows of a program show."""
    extra: dict[str, dict[str, Any]] = {
        "plain": {},
        "mmbench": {"round_id": 0, "options": ["a", "b"], "option_char": ["A", "B"]},
        "qbench": {"img_path": "a.png", "question": "?", "candidates": ["x", "y"], "concern": 1, "type": "what"},
        "long answers": {},
    }
    tasks = []
    for number in range(3):
        text = f"Q {number}?"
        tasks.append(Task(number, text, text, (), f"q.jsonl:{number}", extra[program] | {"question": text}))
    return tasks


def long_row(task: Task, text: str, model_id: str) -> dict[str, Any]:
    values = {"turns": [{"ppl": 1.5, "tokens": 3, "text": text}], "positions": 9}
    return long_answers._result_row(task, json.dumps(values) if text else "", model_id)


PROGRAMS: dict[str, ToRow] = {
    "plain": answer_row,
    "mmbench": mmbench.to_row,
    "qbench": model_vqa_qbench.to_row,
    "long answers": long_row,
}
"""Each kind of row that a program of this project writes into a file which it continues."""


def open_file(path: Path, program: str = "plain", **changes: Any) -> AnswersFile:
    given = {"model_id": "tiny", "settings": SETTINGS, "to_row": PROGRAMS[program]} | changes
    return AnswersFile(path, tasks_of(program), **given)


def answered(path: Path, program: str = "plain") -> bytes:
    """A finished answers file and its content."""
    answers = open_file(path, program)
    answers.append({key: f'an "answer"\n with é, {key[:4]}' for key in answers.pending})
    answers.finish()
    return path.read_bytes()


def refused(folder: Path, work: Callable[[], Any], *words: str) -> None:
    before = snapshot(folder)
    with pytest.raises(LlavaError) as error:
        work()
    assert snapshot(folder) == before
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("restart", [False, True], ids=["continued", "restarted"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_untouched(kind: str, restart: bool, tmp_path: Path) -> None:
    for number in range(DRAWS):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(CORPUS[f"{kind} {number}"])
        refused(
            tmp_path, lambda path=path: open_file(path, restart=restart), str(path), "it looks like", "name another"
        )


@pytest.mark.parametrize("kind", ["CSV", "PNG", "JPEG", "JSON list", "UTF-16", "questions", "Git LFS pointer"])
def test_the_message_says_what_the_file_looks_like(kind: str, tmp_path: Path) -> None:
    said = {
        "CSV": "a table of comma- or tab-separated values that begins with 'index,question,answer'",
        "PNG": "a PNG image",
        "JPEG": "a JPEG image",
        "JSON list": "a JSON list",
        "UTF-16": "text in UTF-16",
        "questions": "JSON rows with the keys question_id, image, text, category",
        "Git LFS pointer": "a Git LFS pointer",
    }
    (tmp_path / "a.jsonl").write_bytes(CORPUS[f"{kind} 0"])
    refused(tmp_path, lambda: open_file(tmp_path / "a.jsonl"), said[kind])


@pytest.mark.parametrize("restart", [False, True], ids=["continued", "restarted"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_file_is_untouched(kind: str, restart: bool, tmp_path: Path) -> None:
    SPECIAL[kind](tmp_path / "a.jsonl")
    refused(tmp_path, lambda: open_file(tmp_path / "a.jsonl", restart=restart), "it looks like")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_torn_file_is_completed(program: str, tmp_path: Path) -> None:
    """Cut anywhere, at every byte of the last two rows and at random places: the same bytes at the end."""
    path = tmp_path / "a.jsonl"
    whole = answered(path, program)
    last = len(b"".join(whole.splitlines(keepends=True)[-2:]))
    draw = random.Random(SEED)
    for cut in [*range(len(whole) - last, len(whole)), *(draw.randrange(len(whole)) for _ in range(50))]:
        path.write_bytes(whole[:cut])
        answers = open_file(path, program)
        assert len(answers.rows) in (whole[:cut].count(b"\n"), whole[: cut + 1].count(b"\n"))
        answers.append({key: f'an "answer"\n with é, {key[:4]}' for key in answers.pending})
        answers.finish()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n", b"  \n"])
def test_an_empty_file_is_filled(content: bytes, tmp_path: Path) -> None:
    whole = answered(tmp_path / "whole.jsonl")
    (tmp_path / "a.jsonl").write_bytes(content)
    assert answered(tmp_path / "a.jsonl") == whole


def test_spoiled_answers_are_untouched(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(spoiled_answers(answered(tmp_path / "a.jsonl")).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(content)
        refused(folder, lambda folder=folder: open_file(folder / "a.jsonl"), "a.jsonl")
        assert name


@pytest.mark.parametrize("writer", PROGRAMS)
@pytest.mark.parametrize("reader", PROGRAMS)
def test_rows_of_another_program_are_untouched(writer: str, reader: str, tmp_path: Path) -> None:
    if writer == reader:
        return
    answered(tmp_path / "a.jsonl", writer)
    settings_path(tmp_path / "a.jsonl").unlink()
    refused(tmp_path, lambda: open_file(tmp_path / "a.jsonl", reader), "a.jsonl", "name another")


def test_rows_of_another_model_and_other_settings_are_untouched_though_torn(tmp_path: Path) -> None:
    whole = answered(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(whole[:-9])
    refused(tmp_path, lambda: open_file(tmp_path / "a.jsonl", settings={"weights": "def"}), "--restart")
    settings_path(tmp_path / "a.jsonl").unlink()
    refused(tmp_path, lambda: open_file(tmp_path / "a.jsonl", model_id="other"), "--restart")
    open_file(tmp_path / "a.jsonl", model_id="other", restart=True)
    assert (tmp_path / "a.jsonl").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_untouched(tmp_path: Path) -> None:
    whole = answered(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(whole[:-9])
    (tmp_path / "a.jsonl").chmod(0o444)
    refused(tmp_path, lambda: open_file(tmp_path / "a.jsonl"), "cannot be written")


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    refused(tmp_path, lambda: open_file(tmp_path / "file" / "a.jsonl"), "cannot be made")


@pytest.mark.parametrize("content", [b"[1, 2]", b"not JSON", b'{"versions": {}}', b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("restart", [False, True], ids=["continued", "restarted"])
@pytest.mark.parametrize("has_answers", [False, True], ids=["new", "there"])
def test_foreign_settings_are_untouched(content: bytes, restart: bool, has_answers: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    if has_answers:
        answered(path)
    settings_path(path).write_bytes(content)
    refused(tmp_path, lambda: open_file(path, restart=restart), "does not hold the settings of a run", "name another")


class First(Processes):
    """The first of several processes, when the others have arrived."""

    def wait(self) -> None:
        """Nobody is missing."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_merging_processes_replaces_answers_alone(program: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for rank in range(2):
        answered(part_of(path, rank, 2), program)
    for name in FOREIGN:
        path.write_bytes(CORPUS[f"{name} 0"])
        refused(tmp_path, lambda: put_together(First(0, 2), path), path.name, "it looks like")
    path.unlink()
    answered(path, program)
    put_together(First(0, 2), path)
    assert len(path.read_text().splitlines()) == 6


@pytest.mark.parametrize("program", PROGRAMS)
def test_merging_chunks_replaces_answers_alone(program: str, tmp_path: Path) -> None:
    path, parts = tmp_path / "merge.jsonl", [tmp_path / f"2_{number}.jsonl" for number in range(2)]
    contents = [answered(part, program) for part in parts]
    arguments = ["--output", str(path), *map(str, parts)]
    for name in FOREIGN:
        path.write_bytes(CORPUS[f"{name} 1"])
        refused(tmp_path, lambda: merge.main(arguments), "it looks like")
        refused(tmp_path, lambda: merge.main(arguments[:2]), "it looks like")
    path.unlink()
    for _ in range(2):
        merge.main(arguments)
        assert path.read_bytes() == b"".join(contents)
    refused(tmp_path, lambda: merge.main(["--output", str(parts[0]), *map(str, parts)]), "is also PART")
    parts[1].write_bytes(contents[1][:-5])
    refused(tmp_path, lambda: merge.main(arguments), "unfinished")
    parts[1].write_bytes(CORPUS["CSV 0"])
    refused(tmp_path, lambda: merge.main(arguments), "2_1.jsonl", "a table")


def reviews(folder: Path, output: Path) -> list[str]:
    """The command line of a review of two questions; none is left to ask when both reviews are there."""
    question = {"question_id": 1, "text": "?", "image": "a.png", "category": "conv"}
    answer = {"question_id": 1, "text": "yes", "answer_id": "x"}
    files = {
        "question": json.dumps(question) + "\n",
        "context": json.dumps({"image": "a.png", "caption": ["c"]}) + "\n",
        "rule": json.dumps({"llava_bench_conv": {"role": "r", "prompt": "p"}}),
        "answers": json.dumps(answer) + "\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    lists = ["--answer-list", str(folder / "answers"), str(folder / "answers")]
    named = [word for name in ("question", "context", "rule") for word in (f"--{name}", str(folder / name))]
    return [*named, *lists, "--output", str(output)]


def test_reviews_are_recognized_before_they_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reviews.jsonl"
    arguments = reviews(tmp_path, path)
    monkeypatch.setattr(asked_reviews, "ask", lambda *_, **__: "8 7\nfine")
    for name, content in CORPUS.items():
        if name.endswith(" 0"):
            path.write_bytes(content)
            refused(tmp_path, lambda: eval_gpt_review_bench.main(arguments), "does not hold rows of reviews")
    path.unlink()
    eval_gpt_review_bench.main(arguments)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        eval_gpt_review_bench.main(arguments)
        assert path.read_bytes() == whole
    for flag in ("--question", "--context", "--rule"):
        taken = arguments[arguments.index(flag) + 1]
        refused(tmp_path, lambda taken=taken: eval_gpt_review_bench.main([*arguments[:-1], taken]), f"is also {flag}")


def test_broken_lines_keep_their_class_of_error(tmp_path: Path) -> None:
    """A damaged answers file is a bad sample with its line; anything else is a wrong flag."""
    whole = answered(tmp_path / "a.jsonl").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(whole[0] + whole[1][:20] + b"\n" + whole[2])
    with pytest.raises(BadSampleError, match=r"a\.jsonl:2: not valid JSON"):
        open_file(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"[]\n")
    with pytest.raises(FlagError, match="a JSON list"):
        open_file(tmp_path / "a.jsonl")
