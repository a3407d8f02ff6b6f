"""Only names that a program itself wrote are deleted or replaced; `tmp-*` and `X.partial` of a user stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.data.skipped import append_skipped, remove_skipped
from llava.errors import CheckpointError, FlagError, LlavaError
from llava.runtime.output import MARKER, claim, discard, new_path, put_in_place, replace_text
from llava.runtime.saving import prepare_folder, publish_folder, retire, rotate
from tests.reliability.hostile_files import DRAWS, FOREIGN, SPECIAL, corpus
from tests.reliability.snapshots import snapshot

CORPUS = corpus()

Make = Callable[[Path], Any]


def folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def file(path: Path) -> None:
    path.write_text("mine")


def link(path: Path) -> None:
    target = path.parent / "target-of-link"
    target.mkdir(exist_ok=True)
    (target / "mine.txt").write_text("mine")
    path.symlink_to(target)


def other_checkpoint(path: Path) -> None:
    """A checkpoint of another update, under this name."""
    path.mkdir()
    (path / "trainer_state.json").write_text('{"global_step": 5000}')


LEFT_ALONE = ["tmp-notes", "tmp-", "tmp-checkpoint-x", "tmp-checkpoint-5.bak", "run.json.partial", "X.partial", "old"]
IN_THE_WAY = ["tmp-checkpoint-5", "tmp-old-checkpoint-5", "tmp-final", "tmp-universal", "checkpoint-5"]


@pytest.mark.parametrize("make", [folder, file, link])
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_names_that_a_run_does_not_need_are_left_alone(name: str, make: Make, tmp_path: Path) -> None:
    make(tmp_path / name)
    (claim(tmp_path / "tmp-checkpoint-7") / "checkpoint-7").mkdir()
    kept = {key: value for key, value in snapshot(tmp_path).items() if not key.startswith("tmp-checkpoint-7")}
    prepare_folder(tmp_path)
    assert snapshot(tmp_path) == kept


@pytest.mark.parametrize("make", [folder, file, link, other_checkpoint])
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_names_that_a_run_needs_are_refused(name: str, make: Make, tmp_path: Path) -> None:
    make(tmp_path / name)
    (claim(tmp_path / "tmp-checkpoint-7") / "checkpoint-7").mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(FlagError, match=rf"{name}: has (a|the) name .* left as it is"):
        prepare_folder(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("make", [folder, file, link, other_checkpoint])
def test_foreign_checkpoints_are_neither_replaced_nor_rotated(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-5")
    for step in (1, 7, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    staged = claim(tmp_path / "tmp-checkpoint-5") / "checkpoint-5"
    staged.mkdir()
    before = snapshot(tmp_path)
    for work in (lambda: retire(tmp_path / "checkpoint-5"), lambda: publish_folder(staged, tmp_path / "checkpoint-5")):
        with pytest.raises(FlagError, match="no run wrote"):
            work()
        assert snapshot(tmp_path) == before
    rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-9"}


def empty_folder(path: Path) -> None:
    path.mkdir()


PUT = {
    "a file under a new name": (file, None, True),
    "a file over a file": (file, file, True),
    "a folder under a new name": (folder, None, True),
    "a folder over an empty one": (folder, empty_folder, True),
    "a folder over one with files": (folder, folder, False),
    "a folder over a file": (folder, file, False),
    "a file over a folder": (file, folder, False),
}


@pytest.mark.parametrize(("made", "there", "goes"), PUT.values(), ids=PUT)
def test_what_may_be_replaced_in_one_step(made: Make, there: Make | None, goes: bool, tmp_path: Path) -> None:
    made(tmp_path / "new")
    if there is not None:
        there(tmp_path / "real")
    before = snapshot(tmp_path)
    if goes:
        put_in_place(tmp_path / "new", tmp_path / "real")
        assert [path.name for path in tmp_path.iterdir()] == ["real"]
        assert [before[key] for key in sorted(before) if key.startswith("new")] == list(snapshot(tmp_path).values())
    else:
        with pytest.raises(OSError, match="real"):
            put_in_place(tmp_path / "new", tmp_path / "real")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("make", [folder, file, link])
def test_claiming_leaves_others_alone(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "x")
    before = snapshot(tmp_path)
    with pytest.raises(FlagError, match="in the way"):
        claim(tmp_path / "x")
    assert not discard(tmp_path / "x")
    assert snapshot(tmp_path) == before


def test_fellow_processes_share_a_folder(tmp_path: Path) -> None:
    """Eight processes claim the same name at the same time: all of them get it, and nothing else is left."""
    code = "import sys; from llava.runtime.output import claim; claim(__import__('pathlib').Path(sys.argv[1]))"
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "tmp-final")]) for _ in range(8)]
    assert [process.wait() for process in started] == [0] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["tmp-final"]
    assert [path.name for path in (tmp_path / "tmp-final").iterdir()] == [MARKER]


@pytest.mark.parametrize("make", [folder, file, link])
@pytest.mark.parametrize("name", ["out.partial", ".out.partial", ".out.123.partial", "tmp-out", ".out.abc.partial"])
def test_an_export_leaves_other_names_alone(name: str, make: Make, tmp_path: Path) -> None:
    make(tmp_path / name)
    before = snapshot(tmp_path)

    def fail() -> None:
        with new_path(tmp_path / "out") as partial:
            partial.mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert snapshot(tmp_path) == before
    with new_path(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "weights").write_text("new")
    assert {key: value for key, value in snapshot(tmp_path).items() if key.split("/")[0] != "out"} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from llava.runtime.output import new_path\n"
        "with new_path(sys.argv[1]) as path: path.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False).returncode == 9
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    with new_path(tmp_path / "out") as path:  # one that is alive is not touched by a second one
        path.write_text("first")
        assert len(list(tmp_path.glob(".out.*.partial"))) == 1
        with new_path(tmp_path / "other") as second:
            second.write_text("second")
        assert path.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:

    def write() -> None:
        with new_path(tmp_path / "out") as path:
            path.write_text("ours")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(CheckpointError, match="already exists"):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "theirs"}
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="already exists"), new_path(tmp_path / "nowhere"):
        pass


# Results replace earlier results alone

RESULTS: dict[str, tuple[str, str]] = {
    "scores": ('{"accuracy": 0.5, "n": 3}', '{"accuracy": 0.75, "n": 4}'),
    "predictions by id": ('{"1": "a", "2": "b"}', '{"1": "a", "2": "c", "3": "d", "4": "e", "5": "f"}'),
    "list for a server": ('[{"question_id": 1, "answer": "a"}]', '[{"question_id": 2, "answer": "b"}]'),
    "rows": ('{"question_id": 1, "prediction": "A"}\n', '{"question_id": 1, "prediction": "B"}\n' * 2),
    "other report": ("# Speed\n\n| a |\n", "# Speed\n\n| b |\n"),
    "report": ("# Comparison\n\n| a |\n", "# Comparison\n\n| b |\n"),
    "page": ("<!doctype html><title>Comparison</title><p>1", "<!doctype html><title>Comparison</title><p>2"),
    "table": ("a.png\tWhat?\tYes\tno\n", "b.png\tWho?\tNo\tyes\n"),
    "record of a run": (
        '{"arguments": {}, "seed": 1, "versions": {}}',
        '{"arguments": {"a": 1}, "seed": 2, "versions": {}}',
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_replaces_an_earlier_one(name: str, tmp_path: Path) -> None:
    old, new = RESULTS[name]
    for before in (None, "", old, new):
        if before is not None:
            (tmp_path / "r").write_text(before)
        assert replace_text(tmp_path / "r", new).read_text() == new
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_replaces_nothing_else(name: str, tmp_path: Path) -> None:
    new, count = RESULTS[name][1], 0
    for number, kind in enumerate(FOREIGN):
        for draw in range(DRAWS):
            place = tmp_path / f"{number}-{draw}"
            place.mkdir()
            (place / "r").write_bytes(CORPUS[f"{kind} {draw}"])
            refused(place, new)
            count += 1
    for kind, make in SPECIAL.items():
        place = tmp_path / kind
        place.mkdir()
        make(place / "r")
        refused(place, new)
    for other, (text, _) in RESULTS.items():
        if other != name:
            place = tmp_path / f"other-{other}"
            place.mkdir()
            (place / "r").write_text(text)
            refused(place, new)
    assert count == len(FOREIGN) * DRAWS


def refused(place: Path, text: str) -> None:
    before = snapshot(place)
    with pytest.raises(LlavaError, match="not an earlier result"):
        replace_text(place / "r", text)
    assert snapshot(place) == before


def test_a_list_of_skipped_samples_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "skipped_samples.jsonl"
    remove_skipped(path)
    append_skipped(path, (Path("a.json"), 3), "7", "no image")
    remove_skipped(path)
    assert not path.exists()
    for name in FOREIGN:
        path.write_bytes(CORPUS[f"{name} 0"])
        before = snapshot(tmp_path)
        with pytest.raises(FlagError):
            remove_skipped(path)
        assert snapshot(tmp_path) == before
