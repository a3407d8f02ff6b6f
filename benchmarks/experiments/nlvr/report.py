"""From finished steps to the tables of this experiment: accuracies, trained parameters, minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from safetensors import safe_open

from benchmarks.experiments.common.report import mean_and_range
from benchmarks.experiments.nlvr.recipe import METHODS

TASKS = ("verify", "exist", "most", "count")
NAMES = {"base": "base", "lora": "LoRA", "hydra": "HydraLoRA"}


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        method: base, lora or hydra.
        seed: of the run.
        accuracy: by task, in [0, 1].
        parameters: number of trained parameters, counted in the checkpoint.
        minutes: wall time of training on one core.
    """

    method: str
    seed: int
    accuracy: Mapping[str, float]
    parameters: int
    minutes: float


def trained_parameters(checkpoint: Path) -> int:
    """Number of values in the weight files of a checkpoint, tower and extensions included, resume states not."""
    files = [path for path in checkpoint.rglob("*.safetensors") if not _in_resume_state(path, checkpoint)]
    total = 0
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no dict)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _in_resume_state(path: Path, checkpoint: Path) -> bool:
    return path.relative_to(checkpoint).parts[0].startswith("checkpoint-")


def read_result(method: str, seed: int, checkpoint: Path, score: Path, training_marker: Path) -> Result:
    """Result of a run whose training and evaluation are done."""
    scores = json.loads(score.read_text(encoding="utf-8"))["scores"]
    minutes = json.loads(training_marker.read_text(encoding="utf-8"))["minutes"]
    accuracy = {task: scores[task]["accuracy"] for task in TASKS}
    return Result(method, seed, accuracy, trained_parameters(checkpoint), minutes)


def summary_table(baselines: Mapping[str, Mapping[str, float]], results: Sequence[Result]) -> str:
    """Markdown: baselines, then mean and range over the seeds for each method, in per cent."""
    lines = [
        f"| | {' | '.join(TASKS)} | trained parameters | minutes a run |",
        f"| --- | {' | '.join('--:' for _ in TASKS)} | --: | --: |",
    ]
    for name, accuracy in baselines.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * accuracy[task]:.1f}' for task in TASKS)} | - | - |")
    for method in METHODS:
        runs = [result for result in results if result.method == method]
        if not runs:
            continue
        cells = [mean_and_range([100 * run.accuracy[task] for run in runs]) for task in TASKS]
        parameters = "/".join(sorted({f"{run.parameters:,}" for run in runs}))
        minutes = mean(run.minutes for run in runs)
        label = f"{NAMES[method]} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        lines.append(f"| {label} | {' | '.join(cells)} | {parameters} | {minutes:.1f} |")
    return "\n".join(lines)


def seed_table(results: Sequence[Result]) -> str:
    """Markdown: every run by itself."""
    lines = [f"| run | seed | {' | '.join(TASKS)} | minutes |", f"| --- | --: | {'--: | ' * len(TASKS)}--: |"]
    for method in METHODS:
        for run in sorted((one for one in results if one.method == method), key=lambda one: one.seed):
            cells = " | ".join(f"{100 * run.accuracy[task]:.1f}" for task in TASKS)
            lines.append(f"| {NAMES[method]} | {run.seed} | {cells} | {run.minutes:.1f} |")
    return "\n".join(lines)
