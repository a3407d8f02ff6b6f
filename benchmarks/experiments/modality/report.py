"""From finished steps to the tables: accuracy by task and modality, parameters, minutes, learnt routing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from safetensors.torch import load_file

from benchmarks.experiments.common.methods import sizes_of_tensors
from benchmarks.experiments.common.report import mean_and_range
from benchmarks.experiments.common.steps import marker
from benchmarks.experiments.modality.recipe import Method, Recipe, TunedRun
from benchmarks.experiments.modality.tasks import MODALITIES, TASKS
from llava.errors import CheckpointError

COLUMNS = tuple(name for modality, tasks in MODALITIES.items() for name in (*tasks, f"mean {modality}"))
ROUTER = frozenset({"expert_weights", "adapter_modality_embedding"})
"""Parts of the names of what decides a routing."""


@dataclass(frozen=True)
class Result:
    """One scored run.

    Attributes:
        method: its name.
        seed: of the run.
        accuracy: by column, in [0, 1].
        parameters: trained ones, counted in the checkpoint.
        minutes: CPU minutes of training.
    """

    method: str
    seed: int
    accuracy: Mapping[str, float]
    parameters: int
    minutes: float


def columns(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Accuracies by task, and the mean of each modality whose tasks are all there."""
    found = dict(accuracy)
    for modality, tasks in MODALITIES.items():
        if all(task in accuracy for task in tasks):
            found[f"mean {modality}"] = mean(accuracy[task] for task in tasks)
    return found


def read_scores(folder: Path, name: str) -> dict[str, float]:
    """Accuracy by column of a scored checkpoint."""
    scores = json.loads((folder / f"score-{name}.json").read_text(encoding="utf-8"))["scores"]
    return columns({task: scores[task]["accuracy"] for task in TASKS})


def trained_parameters(checkpoint: Path, effective: bool) -> int:
    """Parameters of an adapter that have an effect.

    Args:
        checkpoint: folder of the run.
        effective: all of them; otherwise the router is idle and the second up-projection is a copy of the first.

    Raises:
        CheckpointError: the two up-projections of adapters without routing differ, so they had been routed.
    """
    files = [
        path
        for path in checkpoint.rglob("*.safetensors")
        if not path.relative_to(checkpoint).parts[0].startswith("checkpoint-")
    ]
    if effective:
        return sum(sizes_of_tensors(files).values())
    total = 0
    for path in files:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            parts = name.split(".")
            if "conv_D" in parts:
                if not tensor.equal(tensors[name.replace("conv_D", "conv_B")]):
                    raise CheckpointError(f"{path}: '{name}' differs from the other up-projection; it was routed")
            elif not ROUTER & set(parts):
                total += tensor.numel()
    return total


def read_result(recipe: Recipe, run: TunedRun, folder: Path) -> Result:
    """Result of a run that is scored."""
    method = run.method
    parameters = trained_parameters(folder / run.name, effective=method.temperature in (None, recipe.temperature))
    minutes = json.loads(marker(folder, f"train-{run.name}").read_text(encoding="utf-8"))["cpu_minutes"]
    return Result(method.name, run.seed, read_scores(folder, run.name), parameters, minutes)


def summary_table(
    methods: Sequence[Method], references: Mapping[str, Mapping[str, float]], results: Sequence[Result]
) -> str:
    """Markdown: reference lines, then mean and range over the seeds for each method, in per cent."""
    lines = [
        f"| | {' | '.join(COLUMNS)} | trained parameters | CPU minutes |",
        f"| --- | {'--: | ' * len(COLUMNS)}--: | --: |",
    ]
    for name, accuracy in references.items():
        cells = [f"{100 * accuracy[column]:.1f}" if column in accuracy else "-" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} | - | - |")
    for method in methods:
        found = [result for result in results if result.method == method.name]
        if not found:
            continue
        cells = [mean_and_range([100 * one.accuracy[column] for one in found]) for column in COLUMNS]
        parameters = "/".join(sorted({f"{one.parameters:,}" for one in found}))
        title = f"{method.title} ({len(found)} seed{'s' if len(found) > 1 else ''})"
        lines.append(f"| {title} | {' | '.join(cells)} | {parameters} | {mean(one.minutes for one in found):.1f} |")
    return "\n".join(lines)


def seed_table(methods: Sequence[Method], results: Sequence[Result]) -> str:
    """Markdown: every run by itself, in per cent."""
    lines = [f"| run | seed | {' | '.join(COLUMNS)} | CPU minutes |", f"| --- | --: | {'--: | ' * len(COLUMNS)}--: |"]
    for method in methods:
        for one in sorted((one for one in results if one.method == method.name), key=lambda one: one.seed):
            cells = [f"{100 * one.accuracy[column]:.1f}" for column in COLUMNS]
            lines.append(f"| {method.title} | {one.seed} | {' | '.join(cells)} | {one.minutes:.1f} |")
    return "\n".join(lines)


def routing_lines(routings: Mapping[int, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: for each seed and decoder layer, what `routing.layer_routing` found."""
    lines = [
        "| seed | layer | first way, text | first way, image | difference of the updates |",
        "| --: | --: | --: | --: | --: |",
    ]
    for seed, rows in sorted(routings.items()):
        for layer, row in enumerate(rows):
            lines.append(f"| {seed} | {layer} | {row['text']:.3f} | {row['image']:.3f} | {row['difference']:.3f} |")
    return "\n".join(lines)


def last_loss(checkpoint: Path) -> float:
    """Mean training loss of the last updates that were logged together."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry][-1]
