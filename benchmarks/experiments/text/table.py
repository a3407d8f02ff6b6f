"""The whole text experiment: rows, base, seven kinds of adapters with three seeds each, and the comparison of A and B.

    python -m benchmarks.experiments.text.table --output-dir checkpoints/text

Run from the root of the repository. The same command again continues after an interruption; what is done stays.
`--only-seed 0 --only-method lora` stops after one line: the recipe was settled on that one. It does not fill
the README here; a whole run does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.experiments.common.methods import (
    Method,
    MethodRun,
    Result,
    count_parameters,
    runs_of,
    seed_table,
    summary_table,
)
from benchmarks.experiments.common.report import command_block, fill_document
from benchmarks.experiments.common.steps import Step, marker, run_steps, same_recipe, write_json
from benchmarks.experiments.text import compare
from benchmarks.experiments.text.recipe import BASE_SEED, SEEDS, Recipe, finetune_command
from benchmarks.experiments.text.tasks import TASKS, base_rows, held_out_rows, training_rows
from hydralora.text.training import ADAPTER_FOLDER

DOCUMENT = Path(__file__).with_name("README.md")
"""Where the tables go."""
DOCUMENTED_FOLDER = Path("checkpoints/text")
SHOWN = ("train-hydra-3-0", "score-hydra-3-0", "compare-tasks")
"""Steps whose commands README.md shows."""
PRELOAD = ("hydralora", "hydralora.text.training", "hydralora.text.arguments", "hydralora.analysis.figures")
NAMES = [task.name for task in TASKS]


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="everything that is made goes here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--only-method", help="name of one method, for example lora")
    parser.add_argument("--only-seed", type=int, help="one of the seeds")
    return parser


def prepare(recipe: Recipe, folder: Path) -> None:
    """Write all rows, and note the recipe.

    Raises:
        FlagError: the folder was prepared with another recipe.
    """
    if same_recipe(folder, asdict(recipe)):
        return
    write_json(folder / "base.json", base_rows(recipe.base_rows, BASE_SEED))
    held_out = held_out_rows(recipe.held_out)
    sets = {"test": held_out} | {f"train-{seed}": training_rows(recipe.rows, seed, held_out) for seed in SEEDS}
    for name, rows in sets.items():
        kind, _, seed = name.partition("-")
        for task in NAMES:
            write_json(folder / f"{'-'.join(filter(None, [kind, task, seed]))}.json", rows[task])
        write_json(folder / f"{name}.json", [row for task in NAMES for row in rows[task]])
    write_json(folder / "recipe.json", asdict(recipe))


def base_step(folder: Path) -> Step:
    """Training of the base."""
    flags = ("--data", str(folder / "base.json"), "--output-dir", str(folder / "base"), "--seed", str(BASE_SEED))
    return Step("train-base", (("-m", "benchmarks.experiments.text.base", *flags),))


def score_step(name: str, task: str | None, folder: Path) -> Step:
    """Exact match of an adapter, or of the base, on all test rows or on those of one task."""
    data = folder / f"{'-'.join(filter(None, ['test', task]))}.json"
    adapter = () if name == "base" else ("--adapter", str(folder / name / ADAPTER_FOLDER))
    flags = ("--data", str(data), "--output", str(folder / f"score-{name}.json"))
    command = ("-m", "benchmarks.experiments.text.evaluate", "--model", str(folder / "base"), *adapter, *flags)
    return Step(f"score-{name}", (command,), (f"train-{name}",))


def steps_of(run: MethodRun, recipe: Recipe, folder: Path) -> list[Step]:
    """Training of one adapter and its answers, to all questions or to those of its task."""
    rows = folder / f"{run.data_name}.json"
    command = finetune_command(recipe, run, folder / "base", rows, folder / run.name)
    return [Step(f"train-{run.name}", (command,), ("train-base",)), score_step(run.name, run.task, folder)]


def all_steps(recipe: Recipe, folder: Path, methods: Sequence[Method], seeds: Sequence[int]) -> list[Step]:
    """Every step of the table; the base first, then seed by seed."""
    steps = [base_step(folder), score_step("base", None, folder)]
    for seed in seeds:
        for method in methods:
            for run in runs_of(method, seed, NAMES):
                steps += steps_of(run, recipe, folder)
    return steps


def read_scores(folder: Path, name: str) -> dict[str, float]:
    """Accuracy by name of the task."""
    scores = json.loads((folder / f"score-{name}.json").read_text(encoding="utf-8"))
    return {NAMES[int(number)]: value for number, value in scores.items()}


def read_result(folder: Path, method: Method, seed: int) -> Result:
    """Result of a method whose runs with this seed are scored; LoRA's one router has no effect and is not counted."""
    accuracy: dict[str, float] = {}
    total = routers = 0
    minutes = 0.0
    for run in runs_of(method, seed, NAMES):
        accuracy |= read_scores(folder, run.name)
        files = [folder / run.name / ADAPTER_FOLDER / "adapter_model.safetensors"]
        counts = count_parameters(files, frozenset({"hydralora_router", "lora_router"}))
        total, routers = total + counts[0], routers + counts[1]
        minutes += json.loads(marker(folder, f"train-{run.name}").read_text(encoding="utf-8"))["cpu_minutes"]
    if not method.experts:
        total, routers = total - routers, 0
    return Result(method.name, seed, accuracy, total, routers, minutes)


def documented_commands(recipe: Recipe) -> list[tuple[str, ...]]:
    """The commands that README.md shows, with the folder of the documented call."""
    steps = all_steps(recipe, DOCUMENTED_FOLDER, recipe.methods, SEEDS) + compare.steps(recipe, DOCUMENTED_FOLDER)
    commands = {step.name: step.commands for step in steps}
    return [command for name in SHOWN for command in commands[name]]


def write_document(document: Path, recipe: Recipe, folder: Path) -> None:
    """Fill tables, comparison and commands into README.md.

    Raises:
        DocumentError: it lacks the marked places.
    """
    results = [read_result(folder, method, seed) for method in recipe.methods for seed in SEEDS]
    references = {"base": read_scores(folder, "base")}
    contents = {
        "text table": summary_table(recipe.methods, NAMES, references, results),
        "text seeds": seed_table(recipe.methods, NAMES, results),
        "text comparison": compare.summary_table(folder),
        "text commands": command_block(documented_commands(recipe)),
    }
    fill_document(document, contents)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        LlavaError: the folder is of another recipe, or a step failed; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    recipe, folder = Recipe(), args.output_dir
    prepare(recipe, folder)
    whole = args.only_method is None and args.only_seed is None
    methods = [method for method in recipe.methods if args.only_method in (None, method.name)]
    seeds = [seed for seed in SEEDS if args.only_seed in (None, seed)]
    steps = all_steps(recipe, folder, methods, seeds)
    if whole:
        steps += compare.steps(recipe, folder)
    run_steps(steps, folder, args.workers, PRELOAD)
    if whole:
        write_document(DOCUMENT, recipe, folder)
        compare.copy_figure(folder, DOCUMENT.parent)
        print(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
