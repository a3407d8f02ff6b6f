"""Upstream's programs of a cluster of workers: each says what replaces it, and the command that it says is accepted."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava.serve import api

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = {
    "controller": "--host 0.0.0.0 --port 10000",
    "model_worker": "--host 0.0.0.0 --controller http://localhost:10000 --port 40000 --worker http://localhost:40000 "
    "--model-path liuhaotian/llava-v1.5-13b --load-4bit",
}
"""The options of upstream's README, some of them abbreviated."""

EXPECTED = {
    "controller": "--model-path CHECKPOINT --port 8000",
    "model_worker": "--model-path liuhaotian/llava-v1.5-13b --host 0.0.0.0 --port 40000 --load-4bit",
}


@pytest.mark.parametrize("words", ["", "published", "--model-base base --load-8bit --unknown 1"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_program_says_what_replaces_it(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = importlib.import_module(f"llava.serve.{name}")
    with pytest.raises(SystemExit) as ended:
        program.main(shlex.split(PUBLISHED[name] if words == "published" else words))
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"python -m llava.serve.{name}: this program does not exist here. ")
    (command,) = [line for line in said.err.splitlines() if line.startswith("  python -m llava.serve.api ")]
    arguments = shlex.split(command)[3:]
    args = api.build_parser().parse_args(arguments)
    if words == "published":
        assert arguments == EXPECTED[name].split()
    elif words and name == "model_worker":
        assert (args.model_path, args.model_base, args.load_8bit) == ("CHECKPOINT", "base", True)


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.controller", *PUBLISHED["controller"].split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "python -m llava.serve.api --model-path CHECKPOINT" in done.stderr
