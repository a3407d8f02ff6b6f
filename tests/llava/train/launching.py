"""Starting training programs as users do: one process or several under torchrun, with a hard limit on the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.golden import golden_dir

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ROOT / "llava" / "train" / "train.py"
SEVERAL = Path(__file__).with_name("several_runs.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def torchrun(processes: int) -> list[str]:
    """The launcher's command line on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def start(launcher: list[str], program: Path, arguments: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a program; everything that it prints goes to `log`."""
    command = [*launcher, str(program), *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], limit: float) -> int:
    """Exit status of a started program; one that runs longer than `limit` seconds is ended, which is a failure."""
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # a launcher ends its processes then
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def launch_runs(
    processes: int, runs: list[dict[str, Any]], folder: Path, limit: float = 900, program: Path = SEVERAL
) -> str:
    """Several runs one after another in the same processes; returns what was printed.

    Args:
        processes: started by torchrun.
        runs: `arguments` of each run, and what else `several_runs.py` knows, for example `copy`: source and target of
            a folder to copy first.
        folder: for the list of runs and the log.
        limit: seconds for all of them.
        program: takes the list of runs.
    """
    listed = folder / f"runs-{len(list(folder.glob('runs-*.json')))}.json"
    listed.write_text(json.dumps(runs))
    log = listed.with_suffix(".log")
    status = finish(start(torchrun(processes), program, [str(listed)], log), limit)
    assert status == 0, log.read_text()[-4000:]
    return log.read_text()


def mixed_rows(folder: Path) -> Path:
    """A data file in which rows with an image and rows of text alone alternate.

    Of two processes with one row each, the second one gets text alone.
    """
    rows = json.loads((golden_dir("llava") / "data" / "finetune.json").read_text())
    images = [row for row in rows if isinstance(row.get("image"), str)]
    texts = [row for row in rows if "image" not in row]
    mixed = [row for pair in zip(images * 8, texts * 8, strict=False) for row in pair][:16]
    path = folder / "mixed.json"
    path.write_text(json.dumps(mixed))
    return path
