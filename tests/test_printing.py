"""Every program prints on a terminal of any encoding: what the encoding does not have is escaped."""

from __future__ import annotations

import argparse
import io
import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import FlagError
from llava.runtime.program import run_program
from llava.train.data_check import main as check
from llava.train.train import main as train
from tests.structure import ROOT
from tests.test_programs import LISTED, STARTED

GOLDEN = ROOT / "tests" / "golden" / "llava"
SIGNS = "é 中 😀"
ESCAPED = {
    "ascii": rb"\xe9 \u4e2d \U0001f600",
    "cp1252": b"\xe9 \\u4e2d \\U0001f600",
    "latin-1": b"\xe9 \\u4e2d \\U0001f600",
    "utf-8": SIGNS.encode(),
}
"""What a terminal of each encoding gets of `SIGNS`."""

EVERY_PROGRAM = sorted({*LISTED, *STARTED, "llava"})


def narrow(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    """A stream as that of a process whose terminal has the encoding."""
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)


def written(stream: io.TextIOWrapper) -> bytes:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("program", EVERY_PROGRAM)
def test_every_program_prints_on_an_ascii_terminal(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its help, with signs that ASCII does not have at the end, whatever the texts of the day are."""
    plain = argparse.ArgumentParser._print_message
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "_print_message",
        lambda self, message, file=None: plain(self, f"{message}{SIGNS}\n", file),
    )
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    stream = narrow("ascii")
    start = partial(runpy.run_module, program, alter_sys=True)
    if program.endswith(".py"):
        start = partial(runpy.run_path, str(ROOT / program))
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        start(run_name="__main__")
    assert ended.value.code == 0
    assert written(stream).endswith(ESCAPED["ascii"] + b"\n")


@pytest.mark.parametrize("encoding", ESCAPED)
def test_what_an_encoding_has_is_printed_as_it_is(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = narrow(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    run_program(lambda: print(SIGNS))
    assert written(stream) == ESCAPED[encoding] + b"\n"


def test_a_file_name_of_broken_bytes_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """UTF-8 itself cannot write it."""
    stream = narrow("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    run_program(lambda: print(os.fsdecode(b"\xff.png")))
    assert written(stream) == b"\\udcff.png\n"


@pytest.mark.parametrize(("errors", "result"), [("replace", b"? ? ?\n"), ("ignore", b"  \n")])
def test_what_the_user_chose_for_other_signs_holds(errors: str, result: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = narrow("ascii", errors)
    monkeypatch.setattr(sys, "stdout", stream)
    run_program(lambda: print(SIGNS))
    assert written(stream) == result


def test_a_stream_that_is_no_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    run_program(lambda: print(SIGNS))
    assert stream.getvalue() == f"{SIGNS}\n"


def fail() -> None:
    raise FlagError(SIGNS)


def test_an_error_ends_a_program_by_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", narrow("ascii"))
    with pytest.raises(SystemExit, match=f"error: {SIGNS}"):
        run_program(fail)


TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_scores_and_tables_in_a_process_of_its_own(terminal: str, tmp_path: Path) -> None:
    """The table of rich, the JSON that is printed, and the file, which is UTF-8 whatever the terminal is."""
    questions = [{"question_id": f"{SIGNS}{i}", "text": "?", "label": SIGNS, "category": SIGNS} for i in range(2)]
    answers = [{"question_id": row["question_id"], "text": SIGNS, "model_id": SIGNS} for row in questions]
    for name, rows in (("questions", questions), ("answers", answers)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    files = ("--question-file", "questions.jsonl", "--answers-file", "answers.jsonl", "--output", "score.json")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "llava.eval.score", *files],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)} | TERMINALS[terminal],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (ESCAPED["cp1252"] if terminal == "cp1252" else ESCAPED["ascii"]) in done.stdout
    score = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    assert score["scores"][SIGNS]["accuracy"] == 1.0


def test_a_run_in_a_folder_of_another_alphabet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of its data, the table of what is trained, the log and the summary."""
    folder = tmp_path / SIGNS
    folder.mkdir()
    Image.new("RGB", (28, 28), "red").save(folder / f"{SIGNS}.png")
    turns = [{"from": "human", "value": "<image>\nWhich color?"}, {"from": "gpt", "value": SIGNS}]
    rows = [{"id": SIGNS, "image": f"{SIGNS}.png", "conversations": turns}] * 2
    data = folder / f"{SIGNS}.json"
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    words = {
        "model_name_or_path": GOLDEN / "tiny-llava-v1.5",
        "vision_tower": GOLDEN / "tiny-clip",
        "data_path": data,
        "image_folder": folder,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "version": "v1",
        "output_dir": folder / "out",
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    stream = narrow("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    checked = [str(data), "--image_folder", str(folder), "--tokenizer", str(GOLDEN / "tiny-llava-v1.5")]
    report = ["--json", str(tmp_path / "report.json"), "--num_workers", "0", "--image_length", "4"]
    run_program(lambda: check([*checked, *report]))
    run_program(lambda: train([word for name, value in words.items() for word in (f"--{name}", str(value))]))
    text = written(stream).decode("ascii")
    escaped = ESCAPED["ascii"].decode()
    assert f"(id '{escaped}')" in text
    assert "Training finished" in text
    assert escaped in text.partition("Training finished")[2]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["list"][0]["id"] == SIGNS
