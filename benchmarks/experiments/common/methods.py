"""What the experiments with several adapters share: the methods, their runs, and the table of results.

The methods are those of the paper (Tian et al., section 3.1 and table 2): LoRA, LoRA of twice the rank, LoRA-split
(section 3.1: as many parameters as LoRA, in one small adapter for each task) and HydraLoRA with 2 to 5 experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from safetensors import safe_open

from benchmarks.experiments.common.report import mean_and_range

EXPERTS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Method:
    """One line of a table.

    Attributes:
        name: as in names of files.
        title: as in the table.
        rank: of A and of every B.
        experts: number of B for each A; 0: plain LoRA.
        split: one adapter for each task, trained on the rows of that task alone.
    """

    name: str
    title: str
    rank: int
    experts: int = 0
    split: bool = False


def methods_of(rank: int, tasks: Sequence[str]) -> list[Method]:
    """The lines of a table, in order.

    Raises:
        ValueError: the rank cannot be divided among the tasks.
    """
    if rank % len(tasks):
        raise ValueError(f"rank {rank} cannot be divided among {len(tasks)} tasks; take a multiple of {len(tasks)}")
    share = rank // len(tasks)
    return [
        Method("lora", f"LoRA, r = {rank}", rank),
        Method("lora-2r", f"LoRA, r = {2 * rank}", 2 * rank),
        Method("split", f"LoRA-split, {len(tasks)} x r = {share}", share, split=True),
        *(Method(f"hydra-{n}", f"HydraLoRA, r = {rank}, E = {n}", rank, n) for n in EXPERTS),
    ]


@dataclass(frozen=True)
class MethodRun:
    """One adapter.

    Attributes:
        method: how it is trained.
        seed: of its weights at the start and of its training rows.
        task: the only task that it is trained on; None: all.
    """

    method: Method
    seed: int
    task: str | None = None

    @property
    def name(self) -> str:
        """As in names of files."""
        return "-".join(filter(None, [self.method.name, self.task, str(self.seed)]))

    @property
    def data_name(self) -> str:
        """Name of its training rows."""
        return "-".join(filter(None, ["train", self.task, str(self.seed)]))


def runs_of(method: Method, seed: int, tasks: Sequence[str]) -> list[MethodRun]:
    """The adapters of a method: one, or one for each task."""
    return [MethodRun(method, seed, task) for task in tasks] if method.split else [MethodRun(method, seed)]


@dataclass(frozen=True)
class Result:
    """One method with one seed.

    Attributes:
        method: name of the method.
        seed: of the run.
        accuracy: by task, in [0, 1].
        parameters: trained parameters with routers, counted in the checkpoint.
        routers: how many of them are routers.
        minutes: CPU minutes of training; of all its adapters together.
    """

    method: str
    seed: int
    accuracy: Mapping[str, float]
    parameters: int
    routers: int
    minutes: float

    @property
    def overall(self) -> float:
        """Mean over the tasks."""
        return mean(self.accuracy.values())


def sizes_of_tensors(files: Iterable[Path]) -> dict[str, int]:
    """Number of values of each tensor in weight files, by its name; equal names in several files are added up."""
    sizes: dict[str, int] = {}
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no dict)
                count = 1
                for length in tensors.get_slice(name).get_shape():
                    count *= length
                sizes[name] = sizes.get(name, 0) + count
    return sizes


def count_parameters(files: Iterable[Path], router_names: frozenset[str]) -> tuple[int, int]:
    """Trained parameters of an adapter, and how many of them are routers (told by a part of the parameter's name)."""
    sizes = sizes_of_tensors(files)
    routers = sum(size for name, size in sizes.items() if router_names & set(name.split(".")))
    return sum(sizes.values()), routers


def summary_table(
    methods: Sequence[Method],
    tasks: Sequence[str],
    references: Mapping[str, Mapping[str, float]],
    results: Sequence[Result],
) -> str:
    """Markdown: reference lines, then mean and range over the seeds for each method, in per cent."""
    lines = [
        f"| | {' | '.join(tasks)} | mean of tasks | parameters | without routers | CPU minutes |",
        f"| --- | {'--: | ' * len(tasks)}--: | --: | --: | --: |",
    ]
    for name, accuracy in references.items():
        cells = [f"{100 * accuracy[task]:.1f}" for task in tasks]
        overall = f"{100 * mean(accuracy[task] for task in tasks):.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {overall} | - | - | - |")
    for method in methods:
        found = [result for result in results if result.method == method.name]
        if not found:
            continue
        cells = [mean_and_range([100 * one.accuracy[task] for one in found]) for task in tasks]
        overall = mean_and_range([100 * one.overall for one in found])
        parameters = "/".join(sorted({f"{one.parameters:,}" for one in found}))
        without = "/".join(sorted({f"{one.parameters - one.routers:,}" for one in found}))
        minutes = f"{mean(one.minutes for one in found):.1f}"
        title = f"{method.title} ({len(found)} seed{'s' if len(found) > 1 else ''})"
        lines.append(f"| {title} | {' | '.join(cells)} | {overall} | {parameters} | {without} | {minutes} |")
    return "\n".join(lines)


def seed_table(methods: Sequence[Method], tasks: Sequence[str], results: Sequence[Result]) -> str:
    """Markdown: every method with every seed by itself, in per cent."""
    lines = [
        f"| run | seed | {' | '.join(tasks)} | mean of tasks | CPU minutes |",
        f"| --- | --: | {'--: | ' * len(tasks)}--: | --: |",
    ]
    for method in methods:
        for one in sorted((one for one in results if one.method == method.name), key=lambda one: one.seed):
            cells = [f"{100 * one.accuracy[task]:.1f}" for task in tasks]
            numbers = f"{100 * one.overall:.1f} | {one.minutes:.1f}"
            lines.append(f"| {method.title} | {one.seed} | {' | '.join(cells)} | {numbers} |")
    return "\n".join(lines)
