"""Steps that are done once: each is a list of commands, and leaves a file that says so with the minutes it took.

A step that was interrupted runs again; its commands continue by themselves (training from the last checkpoint, answers
from the last row).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from llava.errors import FlagError, LlavaError
from llava.runtime.output import replace_text

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


def run_step(step: Step, folder: Path, preload: Sequence[str] = ()) -> None:
    """Run the commands of a step on one core each, and write its marker.

    `minutes` in the marker is the wall time of this call; `resumed` says whether an earlier call was interrupted.
    With `preload` the commands run in forks of a process that has imported these modules: many short commands would
    spend most of their time in importing torch and transformers. The marker then has `cpu_minutes` too, which do not
    depend on what else the machine does, and do not hold the imports.

    Raises:
        StepError: a command ended with an error.
    """
    log = folder / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    resumed = log.exists()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start, cpu_seconds = time.monotonic(), 0.0
    with log.open("a", encoding="utf-8") as stream:
        for command in step.commands:
            stream.write(f"$ python {shlex.join(command)}\n")
            stream.flush()
            if preload:
                code, seconds = _run_forked(command, log, environment, preload)
                cpu_seconds += seconds
            else:
                code = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False
                ).returncode
            if code:
                raise StepError(f"{step.name}: a command ended with {code}; see {log}")
    record: dict[str, object] = {"minutes": (time.monotonic() - start) / 60, "resumed": resumed}
    if preload:
        record["cpu_minutes"] = cpu_seconds / 60
    record["commands"] = [list(command) for command in step.commands]
    write_json(marker(folder, step.name), record)


def _run_forked(
    command: Sequence[str], log: Path, environment: dict[str, str], preload: Sequence[str]
) -> tuple[int | None, float]:
    """Run `python COMMAND` in a fork of multiprocessing's fork server; its exit code and CPU seconds (0 if killed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))  # read when the server starts, with the first command
    os.environ.update(environment)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_as_program, args=(tuple(command), str(log), environment, sender))
    process.start()
    process.join()
    return process.exitcode, receiver.recv() if receiver.poll() else 0.0


def _as_program(command: tuple[str, ...], log: str, environment: dict[str, str], sender: Connection) -> None:
    """Be `python COMMAND`: its arguments, its folder, its environment, and the log as its output."""
    with open(log, "a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    os.chdir(ROOT)
    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            runpy.run_path(command[0], run_name="__main__")
    finally:
        sender.send(time.process_time())


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(value, indent=2) + "\n", check=False)


def same_recipe(folder: Path, settings: object) -> bool:
    """Whether the folder was prepared with these settings; False if it was not prepared yet.

    Raises:
        FlagError: it was prepared with others.
    """
    record = folder / "recipe.json"
    if not record.exists():
        return False
    if json.loads(record.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
        raise FlagError(f"{record}: was made with another recipe; give another --output-dir or remove the folder")
    return True


def run_steps(steps: Sequence[Step], folder: Path, workers: int, preload: Sequence[str] = ()) -> None:
    """Run what is not done yet, `workers` steps at a time, each after what it needs; earlier steps in the list first.

    `preload` is handed to `run_step`.

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
                under_way[pool.submit(run_step, step, folder, preload)] = step
            if not under_way:
                raise ValueError(f"steps wait for each other: {[step.name for step in waiting]}")
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                step = under_way.pop(future)
                future.result()
                done.add(step.name)
                print(f"{time.strftime('%H:%M:%S')} done {step.name}", flush=True)
