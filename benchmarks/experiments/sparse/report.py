"""From scores to the tables and the figure of the README: accuracy by keep rate, mean and range over the seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.experiments.common.report import mean_and_range
from benchmarks.experiments.sparse.recipe import RATES, SEEDS, Setting, TrainedModel
from llava.runtime.output import replacing


@dataclass(frozen=True)
class Line:
    """One way of dropping, a line of the tables.

    Attributes:
        way: how the model was trained.
        rule: what judges at inference; none: the model itself.
        title: as in the tables.
    """

    way: str
    rule: str
    title: str


LINES = (
    Line("dense", "none", "nothing is dropped"),
    Line("learned", "none", "learned predictor"),
    Line("dense", "random", "random"),
    Line("random", "random", "random, trained with random dropping"),
    Line("dense", "attention", "attention scores (FastV)"),
)


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        setting: name of the setting.
        way: how the model was trained.
        rule: what judged.
        keep_rate: at inference; 1: nothing was dropped.
        seed: of training, and of chance.
        accuracy: by group of tasks, in [0, 1].
    """

    setting: str
    way: str
    rule: str
    keep_rate: float
    seed: int
    accuracy: Mapping[str, float]


def score_name(run: TrainedModel, rule: str, keep_rate: float) -> str:
    """As in names of files."""
    return run.name if rule == "none" else f"{run.name}-{rule}-{keep_rate:g}"


def read_result(folder: Path, run: TrainedModel, rule: str, keep_rate: float) -> Result:
    """The score of a trained model under a rule; a group's accuracy is over all its questions together."""
    path = folder / f"score-{score_name(run, rule, keep_rate)}.json"
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    accuracy = {
        group: sum(scores[task]["correct"] for task in tasks) / sum(scores[task]["n"] for task in tasks)
        for group, tasks in run.setting.groups.items()
    }
    return Result(run.setting.name, run.way, rule, keep_rate, run.seed, accuracy)


def chosen(results: Sequence[Result], setting: Setting, line: Line, keep_rate: float) -> list[Result]:
    """The measurements behind one cell, by seed."""
    key = (setting.name, line.way, line.rule, keep_rate)
    found = [one for one in results if (one.setting, one.way, one.rule, one.keep_rate) == key]
    return sorted(found, key=lambda one: one.seed)


def summary(values: Sequence[float]) -> str:
    """A cell: mean and range, and how many seeds there are if some are missing; a dash without any."""
    if not values:
        return "-"
    if len(values) == len(SEEDS):
        return mean_and_range(values)
    return f"{mean(values):.1f} (1 seed)" if len(values) == 1 else f"{mean_and_range(values)}, {len(values)} seeds"


def summary_tables(settings: Sequence[Setting], results: Sequence[Result]) -> str:
    """Markdown: for each setting and group a table of ways by keep rates, in per cent."""
    tables = []
    for setting in settings:
        for group in setting.groups:
            rows = []
            for line in LINES:
                cells = [chosen(results, setting, line, rate) for rate in (1.0, *RATES)]
                if any(cells):
                    values = [[100 * one.accuracy[group] for one in cell] for cell in cells]
                    rows.append([line.title, *(summary(cell) for cell in values)])
            if rows:
                head = [f"**{setting.title}: {group}**", "1.0", *(f"{rate:g}" for rate in RATES)]
                rule = ["---", *("--:" for _ in head[1:])]
                tables.append("\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)))
    return "\n\n".join(tables)


def seed_table(settings: Sequence[Setting], results: Sequence[Result]) -> str:
    """Markdown: every measurement by itself, in per cent."""
    rows = [["model", "task", "dropping", "keep rate", "seeds 0, 1, 2"], ["---", "---", "---", "--:", "---"]]
    for setting in settings:
        for group in setting.groups:
            for line in LINES:
                for rate in (1.0, *RATES):
                    found = chosen(results, setting, line, rate)
                    if found:
                        values = ", ".join(f"{100 * one.accuracy[group]:.1f}" for one in found)
                        rows.append([setting.title, group, line.title, f"{rate:g}", values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(path: Path, settings: Sequence[Setting], results: Sequence[Result]) -> None:
    """A PNG with a panel for each setting, of its first group: mean over the seeds, bars from lowest to highest."""
    from matplotlib.figure import Figure

    shown = [setting for setting in settings if any(one.setting == setting.name for one in results)]
    figure = Figure(figsize=(4 * len(shown), 4), layout="constrained")
    for setting, panel in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        group = next(iter(setting.groups))
        for number, line in enumerate(LINES):
            cells = [(rate, chosen(results, setting, line, rate)) for rate in (1.0, *RATES)]
            points = [(rate, [100 * one.accuracy[group] for one in cell]) for rate, cell in cells if cell]
            if not points:
                continue
            centre = [mean(values) for _, values in points]
            if line.rule == "none" and line.way == "dense":
                panel.axhline(centre[0], color="grey", linestyle="--", linewidth=1, label=line.title)
                continue
            below = [middle - min(values) for middle, (_, values) in zip(centre, points, strict=True)]
            above = [max(values) - middle for middle, (_, values) in zip(centre, points, strict=True)]
            rates = [rate for rate, _ in points]
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "color": f"C{number}"}
            panel.errorbar(rates, centre, yerr=[below, above], label=line.title, **style)
        panel.set_xscale("log")
        panel.set_xticks(list(RATES), [f"{rate:g}" for rate in RATES])
        panel.minorticks_off()
        panel.set_title(f"{setting.title}: {group}", fontsize=10)
        panel.set_xlabel("keep rate")
    figure.axes[0].set_ylabel("accuracy, %")
    named = {
        title: handle for panel in figure.axes for handle, title in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    titles = [line.title for line in LINES if line.title in named]
    figure.legend(
        [named[title] for title in titles], titles, loc="outside lower center", ncols=2, frameon=False, fontsize=7
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=90)
