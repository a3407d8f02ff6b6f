"""`benchmarks/gpu.sh` with a stand-in for Python: steps and their options, the log, failures and the limit of time."""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.command_lines import ROOT

STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in *"$FAILS"*) echo broken; exit 3 ;; esac
while [ $# -gt 1 ]; do
    if [ "$1" = --output ]; then echo '{}' > "$2"; fi
    shift
done
"""
STEPS = ["updates", "policy-attention", "sparse", "answers"]


def run_script(folder: Path, *words: str, fails: str = "never", seconds: int = 480) -> tuple[int, list[list[str]], str]:
    """Exit status, the calls of Python, and the log."""
    program, calls = folder / "python", folder / "calls"
    program.write_text(STAND_IN, encoding="utf-8")
    program.chmod(0o755)
    calls.touch()
    variables = {"PYTHON": str(program), "CALLS": str(calls), "FAILS": fails, "SECONDS_IN_ALL": str(seconds)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(folder / "records"), *words]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    log = folder / "records" / "gpu.log"
    return done.returncode, [line.split() for line in calls.read_text().splitlines()], log.read_text()


@pytest.mark.parametrize("small", [True, False])
def test_steps_are_programs_with_their_options(small: bool, tmp_path: Path) -> None:
    status, calls, log = run_script(tmp_path, "--device", "cpu", *(["--small"] if small else []))
    assert status == 0
    assert [
        word
        for line in log.splitlines()
        for word in line.split()
        if word.removesuffix(":") in STEPS and word.endswith(":")
    ][::2] == [f"{step}:" for step in STEPS]
    for step, (flag, module, *rest) in zip(STEPS, calls, strict=True):
        assert flag == "-m"
        parsed = importlib.import_module(module).build_parser().parse_args(rest)
        assert parsed.device == "cpu"
        assert parsed.output == tmp_path / "records" / f"{step}.json"
        assert parsed.output.is_file()


def test_a_broken_step_stops_no_other_and_is_told(tmp_path: Path) -> None:
    status, calls, log = run_script(tmp_path, "--device", "cpu", "--small", fails="policy_attention")
    assert status == 1
    assert len(calls) == len(STEPS)
    assert "policy-attention: ends with status 3" in log
    assert "broken" in log


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    status, calls, log = run_script(tmp_path, "--device", "cpu", seconds=5)
    assert (status, calls) == (1, [])
    assert log.count("left out, no time") == len(STEPS)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path), "--smal"], capture_output=True, check=False
    )
    assert done.returncode == 2
