"""Runs of one benchmark side by side: scores, differences, and how sure these are (used by `llava.eval.report`).

Intervals are percentile bootstraps over questions (Efron and Tibshirani, 1993, chapter 13). Differences are paired:
both runs are drawn with the same questions, so that what makes a question hard for both does not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import FlagError
from llava.eval.answering.questions import read_json, read_jsonl
from llava.eval.scoring.matching import id_of

NEEDED = ("benchmark", "title", "split", "model", "questions", "complete", "metrics", "settings", "arguments")
RESAMPLES = 10_000
AT_A_TIME = 2_000_000
"""Numbers drawn together, to bound the memory."""

Key = tuple[str, int]
"""A question's id and its occurrence, since some benchmarks use an id twice."""


@dataclass(frozen=True)
class Scored:
    """A run with what it wrote.

    Attributes:
        path: the result file.
        result: its content.
        samples: single answers by question, where the benchmark scores them here.
    """

    path: Path
    result: dict[str, Any]
    samples: dict[Key, dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.result["model"])


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Group:
    """Runs of the same benchmark and split; the first one is what the others are compared with.

    Attributes:
        notes: what makes the runs less comparable than they look.
    """

    title: str
    split: str
    runs: list[Scored]
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> Scored:
    """A result file of `python -m llava.eval`, and the samples beside it.

    Raises:
        FlagError: it is no such file.
    """
    result = read_json(path, dict)
    missing = [
        name for name in ("benchmark", "split", "model", "metrics", "settings", "arguments") if name not in result
    ]
    if missing:
        raise FlagError(f"{path}: lacks {missing}, so it is no result of python -m llava.eval (NAME.result.json)")
    beside = path.with_name(path.name.removesuffix(".result.json") + ".samples.jsonl")
    seen: Counter[str] = Counter()
    samples = {}
    for _, row in read_jsonl(beside) if beside.is_file() else ():
        name = id_of(row["question_id"])
        samples[name, seen[name]] = row
        seen[name] += 1
    return Scored(path, result, samples)


def group_runs(runs: Sequence[Scored]) -> list[Group]:
    """Runs by benchmark and split, in the order in which they were given.

    Raises:
        FlagError: a run has no question in common with the first of its benchmark and split.
    """
    groups: dict[tuple[str, str], list[Scored]] = {}
    for run in runs:
        groups.setdefault((run.result["benchmark"], run.result["split"]), []).append(run)
    for first, *others in groups.values():
        for other in others:
            if first.samples and other.samples and not first.samples.keys() & other.samples.keys():
                raise FlagError(
                    f"{other.path}: none of its {len(other.samples)} questions is among the {len(first.samples)} of "
                    f"{first.path}, so there is nothing to compare; give runs on the same questions"
                )
    return [
        Group(str(members[0].result["title"]), split, members, _notes(members))
        for (_, split), members in groups.items()
    ]


def _notes(runs: Sequence[Scored]) -> list[str]:
    """Settings that differ, and questions that not all runs answered."""
    notes = []
    for name in sorted(set.union(*(set(run.result["settings"]) for run in runs)) - {"model", "weights"}):
        values = [run.result["settings"].get(name) for run in runs]
        if any(value != values[0] for value in values):
            notes.append(f"`{name}` differs: {', '.join(map(str, values))}")
    counts = [run.result["questions"] for run in runs]
    asked = [set(run.samples) for run in runs]
    if len(set(counts)) > 1:
        notes.append(
            f"the numbers of questions differ: {', '.join(map(str, counts))}; differences are over the common ones"
        )
    elif all(asked) and any(one != asked[0] for one in asked):
        common = len(set.intersection(*asked))
        notes.append(f"the questions differ: {common} of {counts[0]} are common; differences are over those")
    if not all(run.result["complete"] for run in runs):
        notes.append("not the whole benchmark")
    return notes


def mean_scores(run: Scored, seed: int = 0) -> Interval | None:
    """Mean of the single scores in per cent; None where single answers are not scored here."""
    scores = np.array([float(row["score"]) for row in run.samples.values()])
    return _bootstrap(scores, seed) if len(scores) else None


def difference(first: Scored, second: Scored, seed: int = 0) -> Interval | None:
    """Mean of the differences of the single scores, second minus first, in points; None without common questions."""
    common = [key for key in first.samples if key in second.samples]
    deltas = np.array([second.samples[key]["score"] - first.samples[key]["score"] for key in common], dtype=float)
    return _bootstrap(deltas, seed) if len(deltas) else None


def disagreements(first: Scored, second: Scored) -> list[Key]:
    """Questions whose scores differ, the largest differences first."""
    keys = [
        key
        for key, row in first.samples.items()
        if key in second.samples and second.samples[key]["score"] != row["score"]
    ]
    return sorted(keys, key=lambda key: -abs(second.samples[key]["score"] - first.samples[key]["score"]))


def _bootstrap(values: np.ndarray, seed: int) -> Interval:
    """Mean of `values` (n,) times 100, with the 2.5th and 97.5th percentile of the means of resamples."""
    random = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, AT_A_TIME // len(values)))
    means: list[np.ndarray] = []
    while sum(map(len, means)) < RESAMPLES:
        means.append(values[random.integers(len(values), size=(rows, len(values)))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means)[:RESAMPLES], [2.5, 97.5])
    return Interval(100 * float(values.mean()), 100 * float(low), 100 * float(high))
