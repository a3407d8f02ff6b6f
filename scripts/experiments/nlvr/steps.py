"""Steps that are done once: each is a list of commands, and leaves a file that says so with the minutes it took.

A step that was interrupted runs again; its commands continue by themselves (training from the last checkpoint, answers
from the last row).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from llava.errors import LlavaError

ROOT = Path(__file__).resolve().parents[3]
"""Where the commands run: the root of the repository."""


class StepError(LlavaError):
    """A command of a step failed; the message names its log."""


@dataclass(frozen=True)
class Step:
    """Commands that belong together.

    Attributes:
        name: unique; also the name of its log and of its marker.
        commands: words after `python`, one list each, in order.
        needs: names of the steps that must be done before.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()


def marker(folder: Path, name: str) -> Path:
    """The file that says that the step `name` is done: JSON with `minutes` and `commands`."""
    return folder / "steps" / f"{name}.json"


def run_step(step: Step, folder: Path) -> None:
    """Run the commands of a step on one core each, and write its marker.

    `minutes` in the marker is the wall time of this call; `resumed` says whether an earlier call was interrupted.

    Raises:
        StepError: a command ended with an error.
    """
    log = folder / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    resumed = log.exists()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        for command in step.commands:
            stream.write(f"$ python {shlex.join(command)}\n")
            stream.flush()
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False
            )
            if done.returncode:
                raise StepError(f"{step.name}: a command ended with {done.returncode}; see {log}")
    minutes = (time.monotonic() - start) / 60
    write_json(
        marker(folder, step.name),
        {"minutes": minutes, "resumed": resumed, "commands": [list(command) for command in step.commands]},
    )


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run_steps(steps: Sequence[Step], folder: Path, workers: int) -> None:
    """Run what is not done yet, `workers` steps at a time, each after what it needs; earlier steps in the list first.

    Raises:
        StepError: a step failed; those under way were finished first, none was started after it.
        ValueError: a step needs one that is not in the list.
    """
    names = {step.name for step in steps}
    unknown = sorted({need for step in steps for need in step.needs} - names)
    if unknown:
        raise ValueError(f"steps {unknown} are needed but not in the list")
    waiting = [step for step in steps if not marker(folder, step.name).exists()]
    done = names - {step.name for step in waiting}
    print(f"{len(done)} of {len(steps)} steps are done", flush=True)
    under_way: dict[Future[None], Step] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or under_way:
            for step in [step for step in waiting if done.issuperset(step.needs)][: workers - len(under_way)]:
                waiting.remove(step)
                print(f"{time.strftime('%H:%M:%S')} start {step.name}", flush=True)
                under_way[pool.submit(run_step, step, folder)] = step
            if not under_way:
                raise ValueError(f"steps wait for each other: {[step.name for step in waiting]}")
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                step = under_way.pop(future)
                future.result()
                done.add(step.name)
                print(f"{time.strftime('%H:%M:%S')} done {step.name}", flush=True)
